"""flash_attention against the float64 definition: no further off than twice what plain PyTorch is in the same dtype."""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from kernels import flash_attention
from kernels.attention import reference
from kernels.attention.reference import attention_reference
from tests.kernels.rule import assert_within_twice

NAMES = ("out", "lse", "dq", "dk", "dv")
DTYPES = (torch.float32, torch.bfloat16)


def inputs(batch: int, queries: int, keys: int, heads: int, group: int, head_dim: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries, heads * group, head_dim), *((batch, keys, heads, head_dim),) * 2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(attention: Any, tensors: Iterable[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """out, lse (if there is one) and the gradients by q, k and v of a fixed weighting of the output."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    result = attention(*leaves, **options)
    out, *lse = result if isinstance(result, tuple) else (result,)
    direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view_as(out)
    gradients = torch.autograd.grad(out, leaves, direction.to(dtype))
    return [out, *lse, *gradients]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    length = st.sampled_from([1, 2, 3, 7, 17, 33, 65])
    queries = draw(length)
    return {
        "queries": queries,
        "keys": draw(st.one_of(st.just(queries), length)),
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.integers(1, 2)),
        "group": draw(st.sampled_from([1, 2, 3])),
        "head_dim": draw(st.sampled_from([16, 24, 32, 64, 80])),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, None, 1, 5, 40, 1000])),
        "softcap": draw(st.sampled_from([None, None, 3.0, 30.0])),
        "scale": draw(st.sampled_from([None, None, 0.3])),
        "seed": draw(st.integers(0, 1000)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("return_lse", [False, True])
@given(case=cases())
def test_outputs_and_gradients_are_within_twice_the_error_of_plain_pytorch(
    case: dict[str, Any], dtype: torch.dtype, return_lse: bool
) -> None:
    # Past 32 queries PyTorch's own backward pass on a CPU adds up in bf16, further off than its plain operators are.
    assume(dtype == torch.float32 or return_lse or case["queries"] <= 32)
    options = {name: case[name] for name in ("causal", "window", "softcap", "scale")}
    shape = {name: case[name] for name in ("batch", "queries", "keys", "heads", "group", "head_dim", "seed")}
    tensors = [tensor.to(dtype) for tensor in inputs(**shape)]
    exact = run(attention_reference, tensors, torch.float64, **options)
    plain = run(attention_reference, tensors, dtype, **options)
    ours = run(flash_attention, tensors, dtype, return_lse=return_lse, **options)
    assert ours[0].dtype == dtype
    if return_lse:
        assert ours[1].dtype == torch.float32
    else:
        del exact[1], plain[1]
    names = NAMES if return_lse else NAMES[:1] + NAMES[2:]
    for each in zip(names, ours, plain, exact, strict=True):
        assert_within_twice(*each)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[70, 7, 0, 65, 1], [70, 70]], ids=["packed", "dense"])
@pytest.mark.parametrize(("causal", "head_dim"), [(True, 32), (True, 80), (False, 32)])
@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_of_queries_on_a_cpu_are_within_twice_the_error(
    compiled: bool,
    causal: bool,
    head_dim: int,
    lengths: list[int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not compiled:
        monkeypatch.setenv("GPT_KERNELS", "torch")
    bounds = ints(0, *torch.tensor(lengths).cumsum(0).tolist())

    def one_by_one(*leaves: Tensor) -> Tensor:
        alone = zip(*(leaf.split(lengths) for leaf in leaves), strict=True)
        return torch.cat([attention_reference(*(each[None] for each in qkv), causal=causal)[0][0] for qkv in alone])

    def at_once(*leaves: Any) -> Any:
        if lengths[0] == lengths[-1]:
            leaves = tuple(leaf.unflatten(0, (len(lengths), -1)) for leaf in leaves)
            return flash_attention(*leaves, causal=causal).flatten(0, 1)  # type: ignore[union-attr]
        return flash_attention(*leaves, causal=causal, cu_seqlens_q=bounds, cu_seqlens_k=bounds)

    tensors = [tensor[0].to(dtype) for tensor in inputs(1, sum(lengths), sum(lengths), 3, 1, head_dim)]
    exact, plain = (run(one_by_one, tensors, each) for each in (torch.float64, dtype))
    # So little room splits the heads; then nothing is kept for the backward pass.
    for name, value in (("ROWS", reference.ROWS), ("BLOCK_BYTES", 2**15), ("KEPT_LENGTH", 0)):
        monkeypatch.setattr(reference, name, value)
        for each in zip(NAMES[:1] + NAMES[2:], run(at_once, tensors, dtype), plain, exact, strict=True):
            assert_within_twice(*each)


@pytest.mark.parametrize("lengths", [[5, 1, 0, 7, 1], [0, 3], [4, 0], [1], [0]], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"causal": False}], ids=str)
@pytest.mark.parametrize("return_lse", [False, True])
def test_packed_sequences_equal_the_sequences_one_by_one(
    lengths: list[int], options: dict[str, Any], return_lse: bool
) -> None:
    starts = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
    boundaries = torch.tensor(starts, dtype=torch.int32)
    packed = [tensor[0] for tensor in inputs(1, starts[-1], starts[-1], 2, 2, 16)]
    for tensor in packed:
        tensor.requires_grad_()
    result = flash_attention(
        *packed,
        cu_seqlens_q=boundaries,
        cu_seqlens_k=boundaries,
        max_seqlen_q=8,
        max_seqlen_k=8,
        return_lse=return_lse,
        **options,
    )
    out, lse = result if isinstance(result, tuple) else (result, None)
    assert out.shape == packed[0].shape
    (out * out.detach().sin()).sum().backward()
    for start, end in pairwise(starts):
        alone = [tensor.detach()[None, start:end].requires_grad_() for tensor in packed]
        expected, expected_lse = attention_reference(*alone, **options)
        torch.testing.assert_close(out[start:end], expected[0])
        if lse is not None:
            torch.testing.assert_close(lse[:, start:end], expected_lse[0].float())
        (expected * expected.detach().sin()).sum().backward()
        for ours, theirs in zip(packed, alone, strict=True):
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad[start:end], theirs.grad[0])


def test_a_packed_batch_may_hold_no_sequence() -> None:
    empty = torch.zeros(0, 2, 16)
    out, lse = flash_attention(empty, empty, empty, cu_seqlens_q=ints(0), cu_seqlens_k=ints(0), return_lse=True)
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)


def test_packed_queries_and_keys_may_differ_in_length() -> None:
    q, k, v = (tensor[0] for tensor in inputs(1, 6, 9, 2, 1, 16))
    starts_q, starts_k = [0, 2, 2, 6], [0, 5, 6, 9]
    out = flash_attention(
        q,
        k,
        v,
        cu_seqlens_q=torch.tensor(starts_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(starts_k, dtype=torch.int32),
    )
    for (start, end), (start_k, end_k) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        alone = attention_reference(q[None, start:end], k[None, start_k:end_k], v[None, start_k:end_k])[0][0]
        torch.testing.assert_close(out[start:end], alone)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "options", "blind"),
    [
        (5, 2, {}, 3),
        (5, 2, {"window": 1}, 3),
        (5, 2, {"softcap": 4.0}, 3),
        (6, 2, {"causal": False, "window": 2}, 3),
        (3, 0, {}, 3),
        (3, 0, {"causal": False}, 3),
    ],
)
def test_rows_that_see_no_key_give_zero_and_minus_infinity_and_never_nan(
    queries: int, keys: int, options: dict[str, Any], blind: int, return_lse: bool
) -> None:
    tensors = inputs(2, queries, keys, 2, 1, 16)
    out, *lse, dq, dk, dv = run(flash_attention, tensors, torch.float32, return_lse=return_lse, **options)
    assert torch.equal(out[:, :blind], torch.zeros_like(out[:, :blind]))
    assert (out[:, blind:] != 0).any(dim=-1).all()
    assert torch.equal(dq[:, :blind], torch.zeros_like(dq[:, :blind]))
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))
    for each in lse:
        assert (each[..., :blind] == -math.inf).all() and each[..., blind:].isfinite().all()


def test_the_log_sum_exp_has_a_finite_gradient_where_a_row_sees_no_key() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(1, 4, 2, 1, 1, 16))
    _, lse = flash_attention(q, k, v, return_lse=True)
    gradients = torch.autograd.grad(lse[lse.isfinite()].sum(), (q, k))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("return_lse", [False, True])
def test_non_contiguous_inputs_give_the_same_as_contiguous_ones(return_lse: bool) -> None:
    whole = torch.randn(2, 2, 9, 3, 2 * 16)
    q, k, v = (part.transpose(1, 2) for part in whole[..., ::2].unbind(3))
    assert not any(tensor.is_contiguous() for tensor in (q, k, v))
    ours = run(flash_attention, (q, k, v), torch.float32, return_lse=return_lse)
    strided = flash_attention(q, k, v, return_lse=return_lse)
    torch.testing.assert_close(strided[0] if isinstance(strided, tuple) else strided, ours[0])


def test_a_later_key_changes_no_earlier_row() -> None:
    q, k, v = inputs(1, 8, 8, 2, 1, 16)
    before = flash_attention(q, k, v)
    k[:, 5:], v[:, 5:] = 1e3, -1e3
    after = flash_attention(q, k, v)
    assert torch.equal(before[:, :5], after[:, :5])  # type: ignore[call-overload]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


DENSE = (2, 4, 4, 16)
PACKED = {"q": (4, 4, 16), "k": (4, 4, 16), "v": (4, 4, 16), "cu_seqlens_q": ints(0, 4), "cu_seqlens_k": ints(0, 4)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": (4, 4, 16)}),
        ("k", {"k": (2, 4, 4)}),
        ("v", {"v": (2, 5, 4, 16)}),
        ("k", {"k": (2, 4, 4, 8), "v": (2, 4, 4, 8)}),
        ("k", {"k": (3, 4, 4, 16), "v": (3, 4, 4, 16)}),
        ("q", {"k": (2, 4, 3, 16), "v": (2, 4, 3, 16)}),
        ("q", {"k": (2, 4, 0, 16), "v": (2, 4, 0, 16)}),
        ("q", {"q": torch.zeros(DENSE, dtype=torch.int64)}),
        ("k", {"k": torch.zeros(DENSE, dtype=torch.float64)}),
        ("v", {"v": torch.zeros(DENSE, device="meta")}),
        ("window", {"window": 0}),
        ("window", {"window": -3}),
        ("scale", {"scale": 0.0}),
        ("scale", {"scale": float("inf")}),
        ("softcap", {"softcap": 0.0}),
        ("softcap", {"softcap": -1.0}),
        ("q", {"cu_seqlens_q": ints(0, 4), "cu_seqlens_k": ints(0, 4)}),
        ("cu_seqlens_k", {**PACKED, "cu_seqlens_k": None}),
        ("cu_seqlens_q", {**PACKED, "cu_seqlens_q": None}),
        ("cu_seqlens_q", {**PACKED, "cu_seqlens_q": ints(0, 3)}),
        ("cu_seqlens_q", {**PACKED, "cu_seqlens_q": ints(1, 4)}),
        ("cu_seqlens_q", {**PACKED, "cu_seqlens_q": ints(0, 3, 2, 4)}),
        ("cu_seqlens_q", {**PACKED, "cu_seqlens_q": ints()}),
        ("cu_seqlens_k", {**PACKED, "cu_seqlens_k": torch.tensor([0.0, 4.0])}),
        ("cu_seqlens_k", {**PACKED, "cu_seqlens_k": ints(0, 4)[None]}),
        ("cu_seqlens_k", {**PACKED, "cu_seqlens_k": ints(0, 2, 4)}),
        ("max_seqlen_q", {**PACKED, "max_seqlen_q": 3}),
        ("max_seqlen_k", {**PACKED, "max_seqlen_k": 3}),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"q": DENSE, "k": DENSE, "v": DENSE} | change
    ready: dict[str, Any] = {
        key: torch.zeros(value) if isinstance(value, tuple) else value for key, value in arguments.items()
    }
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        flash_attention(**ready)


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 2}, {"softcap": 1.5}, {"causal": False, "window": 2}], ids=str
)
def test_the_reference_passes_gradcheck(options: dict[str, Any]) -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention_reference(q, k, v, **options)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    for queries, keys in ((3, 3), (2, 4), (4, 2)):
        leaves = [tensor.requires_grad_() for tensor in inputs(1, queries, keys, 1, 2, 4)]
        assert torch.autograd.gradcheck(both, leaves)
