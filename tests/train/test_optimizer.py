"""Muon and AdamW behind one face; the learning rate over a run."""

import copy

import pytest
import torch
from torch import nn

from engine.config import ModelConfig, OptimizerConfig, ScheduleConfig
from engine.model import GPT
from train.optimizer import POLAR_EXPRESS, Muon, NorMuon, Optimizer, equaliser, orthogonalise, rate_factor

CONFIG = ModelConfig(vocab_size=50, width=16, blocks=2, heads=2, context=8)


def make(kind: str = "muon") -> tuple[GPT, Optimizer]:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    return model, Optimizer(model, OptimizerConfig(kind=kind), matmul_dtype=torch.float32)  # type: ignore[arg-type]


def take_steps(model: GPT, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(step))
        model.loss(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_the_batched_muon_takes_the_steps_of_pytorchs_own(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for _ in range(3)]
    theirs = copy.deepcopy(ours)
    # In bf16, as PyTorch's always is; a batched product may still round differently.
    mine = Muon(ours, dtype=torch.bfloat16, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(shape)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"])
        assert (a - b).abs().max() < 0.02 * 4 * 0.05


@pytest.mark.parametrize("parts", [(16, 16, 16), (32, 8, 8)])
def test_stacked_maps_are_treated_each_on_its_own(parts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    single: list[torch.Tensor] = [nn.Parameter(torch.randn(rows, 16)) for rows in parts]
    stacked = nn.Parameter(torch.cat([each.detach() for each in single]))
    separate = Muon(single, dtype=torch.float32, lr=0.02)
    together = Muon([{"params": [stacked], "parts": parts}], dtype=torch.float32, lr=0.02)
    for _ in range(3):
        stacked.grad = torch.randn(48, 16)
        for parameter, gradient in zip(single, stacked.grad.split(parts), strict=True):
            parameter.grad = gradient
        separate.step()
        together.step()
    torch.testing.assert_close(stacked, torch.cat(single))


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 48)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    result = orthogonalise(torch.randn(shape), ((3.4445, -4.7750, 2.0315),) * 5, 1e-7, torch.float32)
    singular = torch.linalg.svdvals(result)
    assert result.shape == shape and singular.min() > 0.5 and singular.max() < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 32, 32), (16, 128, 128), (16, 320, 128)])
def test_matrices_near_rank_one_stay_finite_whatever_rounds_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    count, rows, columns = shape
    torch.manual_seed(0)
    of_rank_one = torch.randn(count, rows, 1) @ torch.randn(count, 1, columns)
    uneven = of_rank_one * torch.randn(count, rows, 1).exp() ** 6
    for matrices in (of_rank_one, uneven, 1e-9 * of_rank_one, torch.randn(shape)):
        found = torch.linalg.svdvals(orthogonalise(matrices, POLAR_EXPRESS, 1e-7, dtype))[:, 0]
        assert found.min() > 0.8 and found.max() < 1.2


@pytest.mark.parametrize("decades", [0, 2, 4])
def test_a_gram_matrix_is_enough_to_orthogonalise_a_table(decades: int) -> None:
    torch.manual_seed(0)
    table = torch.randn(300, 16) @ torch.diag(torch.logspace(0, -decades, 16)) @ torch.linalg.qr(torch.randn(16, 16))[0]
    (expected,) = orthogonalise(table[None], POLAR_EXPRESS, 1e-7, torch.float32)
    # The largest singular values are those of what was not rounded away.
    torch.testing.assert_close(table @ equaliser(table.mT @ table), expected, rtol=0.02, atol=0.02 / 300**0.5)
    assert torch.isfinite(equaliser(torch.zeros(4, 4))).all()


def step_of(optimizer: NorMuon, parameter: torch.Tensor) -> torch.Tensor:
    before = parameter.detach().clone()
    optimizer.step()
    return parameter.detach() - before


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_rows_of_a_map_change_by_the_rate_over_the_root_of_its_inputs(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    groups = [{"params": [weight], "parts": (shape[0],), "table": False, "row_decay": 0.95, "weight_decay": 0.0}]
    optimizer = NorMuon(groups, dtype=torch.float32, lr=0.02)
    weight.grad = torch.randn(shape) * torch.logspace(0, -3, shape[0])[:, None]
    rows = step_of(optimizer, weight).square().mean(1).sqrt()
    torch.testing.assert_close(rows, torch.full_like(rows, 0.02 / shape[1] ** 0.5))


def test_rare_and_common_rows_of_a_table_change_by_the_rate() -> None:
    torch.manual_seed(0)
    table = nn.Parameter(torch.zeros(40, 8))
    groups = [{"params": [table], "parts": (), "table": True, "row_decay": 0.95, "weight_decay": 0.0}]
    optimizer = NorMuon(groups, dtype=torch.float32, lr=0.01)
    table.grad = torch.randn(40, 8) * torch.logspace(0, -3, 40)[:, None]
    table.grad[7] = 0  # a token that no text holds
    rows = step_of(optimizer, table).square().mean(1).sqrt()
    assert rows[7] == 0 and torch.isfinite(table).all()
    seen = torch.arange(40) != 7
    torch.testing.assert_close(rows[seen], torch.full((39,), 0.01))
    # A row whose gradient shrinks takes smaller steps, as its running mean remembers larger ones.
    table.grad = table.grad / 10
    assert (step_of(optimizer, table).square().mean(1).sqrt() < 0.0101).all()


def test_a_zero_gradient_is_no_direction() -> None:
    result = orthogonalise(torch.zeros(1, 4, 4), ((3.4445, -4.7750, 2.0315),) * 5, 1e-7, torch.float32)
    assert torch.equal(result, torch.zeros(1, 4, 4))


@pytest.mark.parametrize("kind", ["muon", "normuon", "adamw"])
def test_every_parameter_has_exactly_one_optimizer(kind: str) -> None:
    model, optimizer = make(kind)
    owned = [
        parameter for inner in optimizer.optimizers for group in inner.param_groups for parameter in group["params"]
    ]
    assert len(owned) == len(set(map(id, owned))) == len(list(model.parameters()))


def test_muon_has_the_matrices_of_the_blocks_and_only_those() -> None:
    model, optimizer = make()
    (muon,) = (inner for inner in optimizer.optimizers if isinstance(inner, Muon))
    names = {optimizer.names[parameter] for group in muon.param_groups for parameter in group["params"]}
    assert names == {name for name, parameter in model.named_parameters() if "blocks" in name and parameter.ndim == 2}


def test_normuon_has_the_tables_too_each_with_its_own_rate() -> None:
    model, optimizer = make("normuon")
    (muon,) = (inner for inner in optimizer.optimizers if isinstance(inner, NorMuon))
    rates = {optimizer.names[each]: group["lr"] for group in muon.param_groups for each in group["params"]}
    assert {name for name, each in model.named_parameters() if each.ndim == 2} == set(rates)
    config = OptimizerConfig()
    assert (rates["embedding.weight"], rates["head.weight"]) == (config.embedding_rate, config.head_rate)


def test_the_rate_factor_scales_every_group() -> None:
    _, optimizer = make()
    optimizer.set_rate(0.25)
    assert all(group["lr"] == 0.25 * group["peak"] for inner in optimizer.optimizers for group in inner.param_groups)


@pytest.mark.parametrize("kind", ["muon", "normuon", "adamw"])
def test_a_restored_state_takes_the_same_steps_to_the_bit(kind: str) -> None:
    model, optimizer = make(kind)
    take_steps(model, optimizer, range(3))
    weights = copy.deepcopy(model.state_dict())
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    take_steps(model, optimizer, range(3, 6))
    other, restored = make(kind)
    other.load_state_dict(weights)
    restored.load_state(state)
    take_steps(other, restored, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_rate_rises_through_warm_up_and_is_never_nothing_at_first() -> None:
    config = ScheduleConfig(warmup=0.1)
    assert rate_factor(config, 0.0) == pytest.approx(0.01)
    assert rate_factor(config, 0.05) == pytest.approx(0.5)
    assert rate_factor(config, 0.1) == pytest.approx(1.0)


def test_cosine_falls_to_its_floor() -> None:
    config = ScheduleConfig(shape="cosine", warmup=0.2, floor=0.1)
    assert rate_factor(config, 0.6) == pytest.approx(0.55)
    assert rate_factor(config, 1.0) == pytest.approx(0.1)
    assert rate_factor(config, 1.2) == pytest.approx(0.1)


def test_warm_up_stable_decay_stays_and_then_falls_in_a_straight_line() -> None:
    config = ScheduleConfig(shape="wsd", warmup=0.1, decay=0.4)
    assert [rate_factor(config, share) for share in (0.1, 0.3, 0.59)] == [1.0, 1.0, 1.0]
    assert rate_factor(config, 0.8) == pytest.approx(0.5)
    assert rate_factor(config, 1.0) == pytest.approx(0.0)


def test_no_warm_up_begins_at_the_peak() -> None:
    assert rate_factor(ScheduleConfig(warmup=0.0), 0.0) == 1.0
