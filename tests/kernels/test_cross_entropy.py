"""linear_cross_entropy and linear_log_probs: values and gradients against whole logits, and the memory they save."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import cross_entropy, linear_cross_entropy, linear_log_probs
from kernels.cross_entropy import row_gradients_op, row_statistics_op, summed_loss_op
from tests.kernels import losses
from tests.kernels.losses import problem, with_gradients
from tests.kernels.rule import assert_within_twice

REDUCTIONS = ("mean", "sum", "none")
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 2.0}, {"z_loss": 0.1}, {"softcap": 3.0, "z_loss": 0.05}]
LOG_PROBS_OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"temperature": 1.5, "softcap": 3.0}]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def log_probs(*arguments: Any, **options: Any) -> Tensor:
    return torch.stack(linear_log_probs(*arguments, **options), dim=-1)


@pytest.fixture(params=[256, 8], ids=["one block", "many blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "SMALLEST_BLOCK", request.param)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 0)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_loss_and_gradients_are_those_of_cross_entropy_on_whole_logits(
    reduction: str, options: dict[str, Any], ignore_index: int
) -> None:
    hidden, weight, targets = problem(ignore_index=ignore_index)
    settings = {"reduction": reduction, "ignore_index": ignore_index, **options}
    ours = with_gradients(linear_cross_entropy, hidden.double(), weight.double(), targets, **settings)
    exact = with_gradients(losses.cross_entropy, hidden.double(), weight.double(), targets, **settings)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES, ids=str)
def test_the_error_is_within_twice_that_of_plain_pytorch(
    reduction: str, options: dict[str, Any], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    hold_to_the_rule(
        (linear_cross_entropy, losses.cross_entropy), (dtype, weight_dtype), {"reduction": reduction, **options}
    )


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("options", LOG_PROBS_OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES, ids=str)
def test_so_is_the_error_of_log_probabilities_and_entropies(
    options: dict[str, Any], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    hold_to_the_rule((log_probs, losses.log_probs), (dtype, weight_dtype), options)


def hold_to_the_rule(functions: tuple[Any, Any], dtypes: tuple[torch.dtype, torch.dtype], options: Any) -> None:
    hidden, weight, targets = problem()
    hidden, weight = hidden.to(dtypes[0]), weight.to(dtypes[1])
    # With fp32 weights both multiply what is left of them in bf16: that is the function whose error is measured.
    exact = with_gradients(functions[1], hidden.double(), weight.to(dtypes[0]).double(), targets, **options)
    plain = with_gradients(functions[1], hidden, weight, targets, **options)
    ours = with_gradients(functions[0], hidden, weight, targets, **options)
    assert [each.dtype for each in ours] == [torch.float32, *dtypes]
    for name, mine, theirs, true in zip(("out", "dhidden", "dweight"), ours, plain, exact, strict=True):
        assert_within_twice(name, mine, theirs, true)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("options", LOG_PROBS_OPTIONS, ids=str)
def test_log_probabilities_and_entropies_are_those_of_the_whole_softmax(options: dict[str, Any]) -> None:
    hidden, weight, targets = problem()
    arguments = (hidden.double(), weight.double(), targets)
    for mine, true in zip(
        with_gradients(log_probs, *arguments, **options),
        with_gradients(losses.log_probs, *arguments, **options),
        strict=True,
    ):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("used", [0, 1])
def test_either_result_of_log_probs_may_be_left_unused(used: int) -> None:
    arguments = problem()
    mine = with_gradients(lambda *given: linear_log_probs(*given)[used], *arguments)
    plain = with_gradients(lambda *given: losses.log_probs(*given)[..., used], *arguments)
    for ours, theirs in zip(mine, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_reduction_the_cross_entropy_is_minus_the_log_probability() -> None:
    arguments = problem()
    assert torch.equal(linear_cross_entropy(*arguments, reduction="none"), -linear_log_probs(*arguments)[0])


def test_of_equal_logits_the_entropy_is_the_logarithm_of_their_number() -> None:
    _, entropy = linear_log_probs(torch.zeros(3, 4), torch.randn(32, 4), torch.arange(3))
    torch.testing.assert_close(entropy, torch.full((3,), 32.0).log())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_passes_gradcheck(reduction: str, options: dict[str, Any]) -> None:
    hidden, weight, targets = problem(rows=4, width=3, vocab=5)
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, reduction=reduction, **options), leaves
    )


@pytest.mark.parametrize("options", LOG_PROBS_OPTIONS, ids=str)
def test_log_probs_pass_gradcheck(options: dict[str, Any]) -> None:
    hidden, weight, targets = problem(rows=4, width=3, vocab=5)
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda hidden, weight: linear_log_probs(hidden, weight, targets, **options), leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
def test_a_row_that_does_not_count_cannot_poison_the_others(reduction: str, poison: float) -> None:
    hidden, weight, targets = problem()
    poisoned = hidden.masked_fill((targets == -100)[:, None], poison)
    for function, options in ((linear_cross_entropy, {"reduction": reduction}), (log_probs, {})):
        clean = with_gradients(function, hidden, weight, targets, **options)
        for before, after in zip(clean, with_gradients(function, poisoned, weight, targets, **options), strict=True):
            assert torch.equal(before, after)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 6])
def test_where_nothing_counts_the_gradients_are_zero_and_the_loss_is_that_of_cross_entropy(
    reduction: str, rows: int
) -> None:
    hidden, weight, targets = problem(rows=rows)
    targets[:] = -100
    loss, *gradients = with_gradients(linear_cross_entropy, hidden, weight, targets, reduction=reduction)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert not any(gradient.any() for gradient in gradients)
    assert not any(each.any() for each in with_gradients(log_probs, hidden, weight, targets))


@pytest.mark.parametrize("largest", [60.0, 3e4])
def test_large_logits_do_not_overflow(largest: float) -> None:
    hidden, weight, targets = problem()
    ours = with_gradients(linear_cross_entropy, hidden * largest, weight, targets)
    exact = with_gradients(losses.cross_entropy, hidden.double() * largest, weight.double(), targets)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)


def test_leading_dimensions_and_strides_do_not_matter() -> None:
    hidden, weight, targets = problem(rows=24)
    shaped = hidden.view(2, 3, 4, -1).transpose(0, 1), weight, targets.view(2, 3, 4).transpose(0, 1)
    losses = linear_cross_entropy(*shaped, reduction="none")
    assert losses.shape == (3, 2, 4)
    torch.testing.assert_close(
        losses.transpose(0, 1).flatten(), linear_cross_entropy(hidden, weight, targets, reduction="none")
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


def test_the_meter_of_the_next_test_sees_whole_logits() -> None:
    with LargestTensor() as plain:
        losses.cross_entropy(torch.randn(64, 8), torch.randn(128, 8), torch.zeros(64, dtype=torch.int64))
    assert plain.elements == 64 * 128


def test_the_logits_are_never_whole_in_memory() -> None:
    tokens, width, vocab = 4096, 8, 4096
    arguments = torch.randn(tokens, width), torch.randn(vocab, width), torch.randint(vocab, (tokens,))
    options = (-100, 5.0)
    # What the operators run, called by itself: a mode does not see into an operator.
    with LargestTensor() as ours:
        cross_entropy.summed_loss(*arguments, *options, 1e-4, True)
        rows = cross_entropy.row_statistics(*arguments, *options, 1.0, True)
        cross_entropy.row_gradients(*arguments, *rows[1:], *rows, *options, 1.0, True)
    assert 0 < ours.elements <= tokens * vocab // 8


@pytest.mark.parametrize("function", [linear_cross_entropy, log_probs])
def test_a_weight_that_does_not_learn_costs_no_gradient(function: Any) -> None:
    hidden, weight, targets = problem()
    expected = with_gradients(function, hidden, weight, targets)
    hidden.requires_grad_()
    out = function(hidden, weight, targets)
    direction = torch.linspace(1, 2, out.numel()).view_as(out)
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        assert torch.equal(torch.autograd.grad(run(hidden, weight, targets), hidden, direction)[0], expected[1])
    with LargestTensor() as ours:
        rows = torch.randn(16, 8), torch.randn(4096, 8), torch.zeros(16, dtype=torch.int64)
        _, _, by_weight = cross_entropy.summed_loss(*rows, -100, None, 0.0, False)
    assert not len(by_weight) and ours.elements == 16 * 4096


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("hidden", {"hidden": torch.ones(3, 5)}),
        ("weight", {"weight": torch.ones(6, 5)}),
        ("targets", {"targets": torch.zeros(4, dtype=torch.int64)}),
        ("targets", {"targets": torch.zeros(3)}),
        ("hidden", {"hidden": torch.ones(3, 4, dtype=torch.int64)}),
        ("softcap", {"softcap": 0.0}),
        ("reduction", {"reduction": "average"}),
        ("targets holds 6; expected 0 to 5, or -100", {"targets": torch.tensor([0, -100, 6])}),
        ("targets holds -1", {"targets": torch.tensor([0, -1, 3])}),
    ],
)
def test_an_argument_that_does_not_fit_is_named(match: str, change: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "hidden": torch.ones(3, 4),
        "weight": torch.ones(6, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(**(given | change))
    if "reduction" not in change:
        with pytest.raises(ValueError, match=match):
            linear_log_probs(**(given | change))


def test_a_temperature_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_log_probs(torch.ones(3, 4), torch.ones(6, 4), torch.zeros(3, dtype=torch.int64), 0)


def test_without_gradients_there_is_one_matrix_product_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: Any) -> None:
        raise AssertionError("gradients are computed")

    monkeypatch.setattr(cross_entropy, "GradientSums", none)
    hidden, weight = torch.randn(8, 4), torch.randn(16, 4, requires_grad=True)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, torch.arange(8))
    linear_cross_entropy(hidden, weight.detach(), torch.arange(8))
    with pytest.raises(AssertionError, match="gradients are computed"):
        linear_cross_entropy(hidden, weight, torch.arange(8))


def test_the_mean_in_half_precision_keeps_small_gradients() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4096, 8).half(), torch.randn(512, 8)
    weight.requires_grad_()
    (2.0**14 * linear_cross_entropy(hidden, weight, torch.randint(0, 512, (4096,)))).backward()
    assert weight.grad is not None and (weight.grad != 0).float().mean() > 0.99


def test_a_gradient_may_be_asked_for_again_and_is_another_tensor() -> None:
    hidden, weight, targets = problem()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, weight, retain_graph=True)
    kept = first.clone()
    (last,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, kept) and torch.equal(last, kept)
    torch.testing.assert_close(twice, 2 * kept)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_refused_rather_than_wrong(reduction: str) -> None:
    hidden, weight, targets = problem()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss.square(), weight, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), weight)


def test_the_operators_keep_their_promises_to_pytorch() -> None:
    hidden, weight, targets = problem(rows=6, width=4, vocab=9)
    hidden.requires_grad_(), weight.requires_grad_()
    for learns in (True, False):
        torch.library.opcheck(summed_loss_op, (hidden, weight.detach(), targets, -100, None, 0.1, learns))
    torch.library.opcheck(summed_loss_op, (hidden, weight, targets, -100, None, 0.1, True))
    for want_entropy in (True, False):
        torch.library.opcheck(row_statistics_op, (hidden, weight, targets, -100, 2.0, 0.7, want_entropy))
    rows = [each.detach() for each in row_statistics_op(hidden, weight, targets, -100, None, 1.0, True)]
    upstream = (rows[0], None, rows[2])
    for learns in (True, False):
        torch.library.opcheck(
            row_gradients_op, (hidden.detach(), weight.detach(), targets, *rows[1:], *upstream, -100, None, 1.0, learns)
        )


def everything(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    chosen, entropy = linear_log_probs(hidden, weight, targets, 0.8)
    total = (chosen * targets).sum() + entropy.sum()
    for reduction in REDUCTIONS:
        total = total + linear_cross_entropy(hidden, weight, targets, reduction=reduction, z_loss=0.1).sum()
    return total


def test_torch_compile_takes_it_whole() -> None:
    arguments = problem()
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    for mine, expected in zip(
        with_gradients(compiled, *arguments), with_gradients(everything, *arguments), strict=True
    ):
        torch.testing.assert_close(mine, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), everything(*arguments))


def test_it_gives_the_same_bits_every_time() -> None:
    arguments = problem()
    first, second = (with_gradients(everything, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
