"""The decoder: what may see what, how it begins, and what it computes in."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import InputError
from engine.model import GPT, KVCache, rotary_angles, rotary_frequencies, rotate
from tests.engine.relatives import RELATIVES, relative

LENGTHS = [7, 1, 12, 4]


def packed(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and boundaries of a packed batch of sequences."""
    total = sum(LENGTHS)
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    return torch.randint(config.vocab_size, (total,)), torch.randint(config.vocab_size, (total,)), boundaries


def gradients(model: GPT) -> list[Tensor]:
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
        parameter.grad = None
    return found


def test_packed_sequences_equal_the_sequences_one_by_one(gpt: GPT) -> None:
    gpt.double()
    tokens, targets, boundaries = packed(gpt.config)
    together = gpt(tokens, cu_seqlens=boundaries)
    loss = gpt.loss(tokens, targets, cu_seqlens=boundaries)
    loss.backward()
    packed_gradients = gradients(gpt)
    losses = []
    for start, end in pairwise(boundaries.tolist()):
        alone = tokens[None, start:end]
        torch.testing.assert_close(together[start:end], gpt(alone)[0])
        losses.append(gpt.loss(alone, targets[None, start:end]))
        losses[-1].backward()
    torch.testing.assert_close(loss, torch.stack(losses).sum())
    for ours, theirs in zip(packed_gradients, gradients(gpt), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_later_token_cannot_change_an_earlier_output(gpt: GPT) -> None:
    tokens = torch.randint(gpt.config.vocab_size, (2, 20))
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % gpt.config.vocab_size
    before, after = gpt(tokens), gpt(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11])
    assert (before[:, 11:] - after[:, 11:]).abs().amax(dim=-1).min() > 1e-3


def test_a_document_cannot_change_its_neighbours(gpt: GPT) -> None:
    tokens, _, boundaries = packed(gpt.config)
    start, end = boundaries[2].item(), boundaries[3].item()
    changed = tokens.clone()
    changed[start:end] = (changed[start:end] + 1) % gpt.config.vocab_size
    before, after = gpt(tokens, cu_seqlens=boundaries), gpt(changed, cu_seqlens=boundaries)
    same = (before == after).all(dim=-1)
    assert same[:start].all() and same[end:].all() and not same[start:end].any()


def test_every_earlier_token_of_a_document_can_change_a_later_output(gpt: GPT) -> None:
    tokens = torch.randint(gpt.config.vocab_size, (1, 10))
    last = gpt(tokens)[0, -1]
    for place in range(9):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % gpt.config.vocab_size
        assert (gpt(changed)[0, -1] - last).abs().max() > 1e-4


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)
    scores = torch.empty(40, 40, dtype=torch.float64)
    cos, sin = rotary_angles(torch.arange(40), ModelConfig(8, 8, 1, 1, 40))
    rotated_q, rotated_k = rotate(q.expand(40, 1, 8), cos, sin), rotate(k.expand(40, 1, 8), cos, sin)
    scores = torch.einsum("thd,shd->ts", rotated_q, rotated_k)
    for distance in range(-30, 31):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-5, atol=1e-5)
    assert scores[:, 0].std() > 0.01
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(40, 1), rtol=1e-6, atol=1e-6)


def test_rotary_pairs_halves_as_gpt_neox_does() -> None:
    cos, sin = rotary_angles(torch.tensor([3]), ModelConfig(8, 4, 1, 1, 40, rotary_base=100.0))
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 4)
    first, second = 3 * 1.0, 3 / 100**0.5
    expected = [math.cos(first), -math.sin(second), math.sin(first), math.cos(second)]
    torch.testing.assert_close(rotate(x, cos, sin).flatten(), torch.tensor(expected))


@pytest.mark.parametrize("blocks", [2, 8])
def test_initialisation_is_scaled_by_depth(blocks: int) -> None:
    model = GPT(ModelConfig(vocab_size=1000, width=64, blocks=blocks, heads=2, context=16))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        into_residual = name.endswith(("output.weight", "contract.weight"))
        expected = 0.02 / math.sqrt(2 * blocks) if into_residual else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_biases_begin_at_zero_and_are_counted() -> None:
    config = ModelConfig(vocab_size=50, width=32, blocks=3, heads=2, context=16, biases=True)
    named = dict(GPT(config).named_parameters())
    assert sum(parameter.numel() for parameter in named.values()) == config.parameters
    biases = [parameter for name, parameter in named.items() if name.endswith("bias")]
    assert len(biases) == 6 * 3 + 1 and not any(bias.any() for bias in biases)


def test_a_new_model_is_as_uncertain_as_can_be(small_config: ModelConfig) -> None:
    model = GPT(small_config)
    tokens, targets, boundaries = packed(small_config)
    loss = model.loss(tokens, targets, cu_seqlens=boundaries) / len(tokens)
    assert loss.item() == pytest.approx(math.log(small_config.vocab_size), abs=0.05)


def test_the_loss_is_the_cross_entropy_of_the_logits(gpt: GPT) -> None:
    tokens, targets, boundaries = packed(gpt.config)
    targets[::3] = -100
    logits = gpt.logits(gpt(tokens, cu_seqlens=boundaries))
    assert logits.dtype == torch.float32 and logits.shape == (len(tokens), gpt.config.vocab_size)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    loss = gpt.loss(tokens, targets, cu_seqlens=boundaries)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, list(gpt.parameters()))
    for ours, theirs in zip(torch.autograd.grad(loss, list(gpt.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_bf16_computes_on_fp32_parameters_and_gives_fp32_gradients(gpt: GPT) -> None:
    tokens, targets, boundaries = packed(gpt.config)
    exact = gpt.loss(tokens, targets, cu_seqlens=boundaries)
    exact.backward()
    wanted = gradients(gpt)
    gpt.compute_dtype = torch.bfloat16
    assert gpt(tokens, cu_seqlens=boundaries).dtype == torch.bfloat16
    loss = gpt.loss(tokens, targets, cu_seqlens=boundaries)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    for parameter, expected in zip(gpt.parameters(), wanted, strict=True):
        assert parameter.grad is not None and parameter.dtype == parameter.grad.dtype == torch.float32
        assert F.cosine_similarity(parameter.grad.flatten(), expected.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("steps", [[12], [5, 1, 1, 3, 2]], ids=str)
def test_reading_through_the_cache_equals_reading_at_once(gpt: GPT, steps: list[int]) -> None:
    tokens = torch.randint(gpt.config.vocab_size, (3, 12))
    cache = KVCache(gpt.config, 3, 16, device="cpu", dtype=torch.float32)
    parts = []
    with torch.no_grad():
        for part in tokens.split(steps, dim=1):
            parts.append(gpt(part, cache=cache))
            cache.lengths = cache.lengths + part.shape[1]
        torch.testing.assert_close(torch.cat(parts, dim=1), gpt(tokens), rtol=1e-4, atol=1e-4)


def test_the_cache_holds_sequences_of_unequal_length(gpt: GPT) -> None:
    tokens = torch.randint(gpt.config.vocab_size, (2, 9))
    cache = KVCache(gpt.config, 2, 16, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        gpt(tokens, cache=cache)
        # The second sequence really has 4 tokens; the other 5 were padding, and are written over.
        cache.lengths = torch.tensor([9, 4])
        following = torch.randint(gpt.config.vocab_size, (2, 1))
        step = gpt(following, cache=cache)[:, 0]
        torch.testing.assert_close(
            step[0], gpt(torch.cat([tokens[0], following[0]])[None])[0, -1], rtol=1e-4, atol=1e-4
        )
        alone = gpt(torch.cat([tokens[1, :4], following[1]])[None])[0, -1]
        torch.testing.assert_close(step[1], alone, rtol=1e-4, atol=1e-4)


def test_a_sequence_longer_than_the_context_is_refused(gpt: GPT) -> None:
    longer = gpt.config.context + 1
    with pytest.raises(ValueError, match="max_seqlen"):
        gpt(torch.zeros(longer, dtype=torch.int64), cu_seqlens=torch.tensor([0, longer], dtype=torch.int32))


def test_a_cache_that_no_memory_holds_is_refused_before_it_is_made(gpt: GPT) -> None:
    with pytest.raises(InputError, match=r"1,000,000,000 texts at once takes [\d,.]+ GiB; there is room for [\d,]+"):
        KVCache(gpt.config, 10**9, 96, device="cpu", dtype=torch.float32)


@pytest.fixture(params=RELATIVES)
def kin(request: pytest.FixtureRequest) -> GPT:
    """A model as others make them, with weights so large that every setting shows."""
    torch.manual_seed(0)
    model = GPT(RELATIVES[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 8 if parameter.ndim == 2 else 1 + 0.3 * torch.randn_like(parameter))
    return model


def test_every_kind_of_model_counts_its_parameters(kin: GPT) -> None:
    assert kin.config.parameters == sum(parameter.numel() for parameter in kin.parameters())
    maps = [each for name, each in kin.named_parameters() if "blocks" in name and each.ndim == 2]
    assert kin.config.matmul_parameters == sum(each.numel() for each in (kin.head_weight, *maps))


def test_every_kind_of_model_sees_the_same_packed_cached_and_in_double(kin: GPT) -> None:
    tokens = torch.randint(kin.config.vocab_size, (2, 20))
    cache = KVCache(kin.config, 2, 24, device="cpu", dtype=torch.float32)
    ends, parts = torch.tensor([0, 20, 40], dtype=torch.int32), []
    with torch.no_grad():
        dense = kin(tokens)
        for part in tokens.split([11, 1, 3, 5], dim=1):
            parts.append(kin(part, cache=cache))
            cache.lengths = cache.lengths + part.shape[1]
        torch.testing.assert_close(kin(tokens.flatten(), cu_seqlens=ends).view_as(dense), dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.cat(parts, dim=1), dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dense, kin.double()(tokens).float(), rtol=1e-4, atol=1e-4)


def test_every_kind_of_model_learns_every_parameter(kin: GPT) -> None:
    kin.compute_dtype = torch.bfloat16
    tokens = torch.randint(kin.config.vocab_size, (2, 20))
    kin.loss(tokens, tokens.roll(-1, 1)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in kin.parameters())


def test_a_block_sees_as_far_as_its_letter_says() -> None:
    tokens, changed = torch.zeros(2, 1, 12, dtype=torch.int64)
    changed[0, 0] = 1
    for pattern, seen in (("w", 3), ("fw", 12), ("f", 12)):
        model = GPT(relative(blocks=2, window=2 if "w" in pattern else None, pattern=pattern)).double()
        moved = (model(tokens) - model(changed)).abs().amax(-1)[0]
        assert (moved > 0).tolist() == [place < seen for place in range(12)], pattern


def test_a_block_without_rotation_sees_a_set_and_not_an_order() -> None:
    tokens = torch.tensor([[5, 6, 7, 8]])
    for pattern, same in (("n", True), ("f", False)):
        model = GPT(relative(blocks=1, pattern=pattern)).double()
        last = [model(tokens[:, order])[0, -1] for order in ([0, 1, 2, 3], [2, 0, 1, 3])]
        assert torch.allclose(last[0], last[1], rtol=0, atol=1e-12) == same


def test_scaled_positions_turn_slower_and_llama3_keeps_the_fast_ones() -> None:
    config = relative(head_width=64, heads=1)
    plain = rotary_frequencies(config)
    linear = rotary_frequencies(dataclasses.replace(config, rotary_scaling="linear", rotary_factor=4.0))
    torch.testing.assert_close(linear, plain / 4)
    llama = rotary_frequencies(RELATIVES["llama"]), rotary_frequencies(relative(heads=4))
    long = dataclasses.replace(config, rotary_scaling="llama3", rotary_factor=8.0, rotary_original=8192)
    ratio = plain / rotary_frequencies(long)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8) and (ratio.diff() >= 0).all()
    assert (llama[0] <= llama[1]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_heads": 3}, "key_heads is 3; it must divide"),
        ({"pattern": "fx"}, "it must be of the letters"),
        ({"pattern": "w"}, "must come with a window"),
        ({"window": 4}, "must come with a window"),
        ({"norm": "rms", "biases": True}, "whose norm must be layer"),
        ({"rotary_scaling": "llama3", "rotary_low": 4.0}, "must be below rotary_high"),
        ({"heads": 5}, "or set model.head_width"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        relative(**settings)
