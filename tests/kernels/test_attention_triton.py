"""The Triton kernels, on a GPU or interpreted on a CPU, held to float64 by the rule of the torch backend."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import ModelConfig
from engine.model import GPT
from kernels import flash_attention
from kernels.attention.reference import attention_reference
from kernels.backend import backend, why_not_triton
from kernels.tiles import Tile
from tests.kernels.rule import assert_within_twice

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("triton_backend"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
# The interpreter multiplies bf16 wrongly (it takes the bits for numbers).
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# Small ones, so that short sequences have many blocks: some full, some on the diagonal, some at an edge.
TILES = [Tile(16, 32, 4, 2), Tile(32, 16, 4, 2), Tile(32, 32, 4, 2)]


def use_tile(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> None:
    monkeypatch.setattr("kernels.tiles.tile", lambda *arguments: tile)


def run(attend: Any, tensors: list[Tensor], weights: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """out, lse, dq, dk, dv of a weighted sum of out and of the finite part of lse."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    out, lse = attend(*leaves, **options)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    ((out * weights[0].to(dtype)).sum() + (finite * weights[1].to(finite.dtype)).sum()).backward()
    return [out.detach(), lse.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    for name, mine, peer, truth in zip(("out", "lse", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_within_twice(name, mine, peer, truth)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    length = st.integers(1, 70)
    queries = draw(length)
    batch, key_heads, heads = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 1, 3), (1, 2, 4)]))
    return {
        "batch": batch,
        "queries": queries,
        "keys": draw(st.one_of(st.just(queries), length)),
        "key_heads": key_heads,
        "heads": heads,
        "head_dim": draw(st.sampled_from([16, 24, 32, 64, 80])),
        "options": {
            "causal": draw(st.booleans()),
            "window": draw(st.sampled_from([None, None, 1, 7, 40, 1000])),
            "softcap": draw(st.sampled_from([None, None, 3.0, 30.0])),
        },
        "strided": draw(st.booleans()),
        "tile": draw(st.sampled_from(TILES)),
        "seed": draw(st.integers(0, 1000)),
    }


def make(case: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(case["seed"])

    def random(*shape: int) -> Tensor:
        if case["strided"]:  # heads before tokens in memory, and a gap between rows
            shape = (shape[0], shape[2], shape[1], shape[3] + 8)
            return torch.randn(shape, generator=generator).transpose(1, 2)[..., :-8].to(DEVICE)
        return torch.randn(shape, generator=generator).to(DEVICE)

    q = random(case["batch"], case["queries"], case["heads"], case["head_dim"])
    k, v = (random(case["batch"], case["keys"], case["key_heads"], case["head_dim"]) for _ in "kv")
    lse_weight = torch.randn(case["batch"], case["heads"], case["queries"], generator=generator).to(DEVICE)
    return [q, k, v], [torch.randn(q.shape, generator=generator).to(DEVICE), lse_weight]


def hold_to_the_rule(case: dict[str, Any], dtype: torch.dtype) -> None:
    tensors, weights = make(case)
    tensors = [tensor.to(dtype) for tensor in tensors]
    options = case.get("options", {})
    exact = run(attention_reference, tensors, weights, torch.float64, **options)
    plain = run(attention_reference, tensors, weights, dtype, **options)
    check(run(flash_attention, tensors, weights, dtype, return_lse=True, **options), plain, exact)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# On a GPU every new combination is compiled first.
@settings(max_examples=5 if DEVICE == "cuda" else 15)
@given(case=cases())
def test_outputs_and_gradients_are_within_twice_the_error_of_plain_pytorch(
    case: dict[str, Any], dtype: torch.dtype, descriptors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = case["tile"]
    use_tile(monkeypatch, Tile(tile.queries, tile.keys, tile.warps, tile.stages, descriptors))
    hold_to_the_rule(case, dtype)


# With the tiles of the table, as they run in earnest.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_every_row_of_the_table_that_runs(head_dim: int, dtype: torch.dtype) -> None:
    length = 70 if dtype == torch.float32 else 150
    shape = {"batch": 1, "queries": length, "keys": length, "key_heads": 1, "heads": 1, "strided": False, "seed": 0}
    hold_to_the_rule({**shape, "head_dim": head_dim}, dtype)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"causal": False, "softcap": 2.0}], ids=str)
def test_packed_sequences_empty_and_single_ones_too_equal_the_sequences_one_by_one(
    options: dict[str, Any], descriptors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tile(monkeypatch, Tile(16, 32, 4, 2, descriptors))
    lengths_q, lengths_k = [33, 0, 1, 70, 5], [33, 4, 1, 40, 0]
    starts_q, starts_k = ([0, *torch.tensor(lengths).cumsum(0).tolist()] for lengths in (lengths_q, lengths_k))
    torch.manual_seed(0)
    tensors = [
        torch.randn(starts[-1], heads, 16, device=DEVICE)
        for starts, heads in ((starts_q, 4), (starts_k, 2), (starts_k, 2))
    ]
    weights = [torch.randn(starts_q[-1], 4, 16, device=DEVICE), torch.randn(4, starts_q[-1], device=DEVICE)]
    options = {**options, "return_lse": True}
    bounds = {
        name: torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        for name, starts in (("cu_seqlens_q", starts_q), ("cu_seqlens_k", starts_k))
    }
    together = run(flash_attention, tensors, weights, torch.float32, **bounds, **options)
    for queries, keys in zip(map(slice, starts_q, starts_q[1:]), map(slice, starts_k, starts_k[1:]), strict=True):
        part = [tensors[0][None, queries], tensors[1][None, keys], tensors[2][None, keys]]
        part_weights = [weights[0][None, queries], weights[1][None, :, queries]]
        alone = run(flash_attention, part, part_weights, torch.float32, **options)
        own = [
            together[0][queries],
            together[1][:, queries],
            together[2][queries],
            together[3][keys],
            together[4][keys],
        ]
        for mine, single in zip(own, alone, strict=True):
            torch.testing.assert_close(mine, single[0], rtol=1e-5, atol=1e-5)


def test_more_sequences_and_heads_than_a_grid_has_rows() -> None:
    sequences, heads = 16_400, 4  # 65,600 of the 65,535 that the second axis of a grid would hold
    if DEVICE == "cpu":
        sequences = 40  # interpreted, one program after the other
    bounds = torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE)
    q, k, v = (torch.randn(sequences, heads, 16, device=DEVICE) for _ in range(3))
    # A sequence of one token sees its own value alone.
    out = flash_attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("options", [{}, {"window": 9, "causal": False, "softcap": 2.0}], ids=str)
def test_gradients_are_the_finite_differences_of_the_output(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tile(monkeypatch, TILES[0])
    tensors, (weight, _) = make({"batch": 1, "queries": 35, "keys": 40, "key_heads": 1, "heads": 2, "head_dim": 16,
                                 "strided": False, "seed": 3})  # fmt: skip
    for position, tensor in enumerate(tensors):
        direction = torch.randn_like(tensor)

        def value(step: float, position: int = position, direction: Tensor = direction) -> float:
            moved = [each + step * direction if i == position else each for i, each in enumerate(tensors)]
            out = flash_attention(*moved, **options)
            assert isinstance(out, Tensor)
            return float((out.double() * weight.double()).sum())

        leaves = [each.clone().requires_grad_() for each in tensors]
        out = flash_attention(*leaves, **options)
        (gradient,) = torch.autograd.grad(out, leaves[position], weight)
        # Richardson's extrapolation: the error of the central difference falls with the fourth power of the step.
        coarse, fine = ((value(step) - value(-step)) / (2 * step) for step in (0.04, 0.02))
        slope = float((gradient.double() * direction.double()).sum())
        assert slope == pytest.approx((4 * fine - coarse) / 3, rel=2e-4, abs=2e-3)


def test_it_gives_the_same_bits_every_time() -> None:
    case = {"batch": 2, "queries": 80, "keys": 80, "key_heads": 1, "heads": 2, "head_dim": 32}
    tensors, weights = make({**case, "strided": False, "seed": 1})
    first, second = (run(flash_attention, tensors, weights, torch.float32, return_lse=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_operators_keep_their_promises_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.attention.op import attention_backward, attention_forward

    q, k, v = (torch.randn(1, 20, heads, 16, device=DEVICE, requires_grad=True) for heads in (2, 1, 1))
    torch.library.opcheck(attention_forward, (q, k, v, None, None, 20, 20, True, 0.25, None, None))
    plain = [tensor.detach() for tensor in (q, k, v)]
    out, lse = attention_forward(*plain, None, None, 20, 20, True, 0.25, None, None)
    saved = (*plain, out, lse, torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(attention_backward, (*saved, None, None, 20, 20, True, 0.25, None, None))
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32, device=DEVICE)
    packed = [tensor.detach()[0].requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(attention_forward, (*packed, bounds, bounds, 13, 13, True, 0.25, 5, 2.0))


def test_torch_compile_takes_it_whole() -> None:
    q, k, v = (torch.randn(1, 20, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attention(q, k, v)
        assert isinstance(out, Tensor)
        return out.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    gradients = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_head_too_large_is_refused_by_name() -> None:
    q = torch.randn(1, 4, 1, 288, device=DEVICE)
    with pytest.raises(ValueError, match="q has head dim 288"):
        flash_attention(q, q, q)


def test_the_model_learns_the_same_through_either_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=50, width=32, blocks=2, heads=2, context=32)).to(DEVICE)
    tokens = torch.randint(0, 50, (64,), device=DEVICE)
    bounds = torch.tensor([0, 20, 21, 52, 64], dtype=torch.int32, device=DEVICE)
    gradients = []
    for name in ("torch", "triton"):
        monkeypatch.setenv("GPT_KERNELS", name)
        loss = model.loss(tokens, tokens.roll(-1), cu_seqlens=bounds)
        gradients.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_backend_is_torch_on_a_cpu_and_what_was_asked_for_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPT_KERNELS")
    assert backend(torch.device("cpu")) == "torch"
    monkeypatch.setenv("GPT_KERNELS", "triton")
    assert backend(torch.device("cpu")) == "triton"
    monkeypatch.setenv("GPT_KERNELS", "cuda")
    with pytest.raises(ValueError, match="expected torch or triton"):
        backend(torch.device("cpu"))


def test_the_probe_launches_a_kernel_and_tells_why_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels.jit

    assert why_not_triton(torch.device(DEVICE)) is None
    why_not_triton.cache_clear()
    monkeypatch.setattr(kernels.jit, "double_kernel", None)
    assert "NoneType" in (why_not_triton(torch.device(DEVICE)) or "")
    why_not_triton.cache_clear()
