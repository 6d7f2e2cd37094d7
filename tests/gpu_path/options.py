"""Every public function of `kernels` over its options, forward and backward: all pairs of their values.

A function here makes one call and returns how often it has to launch which kernel.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from kernels import (
    decode_attention,
    flash_attention,
    layer_norm,
    linear_cross_entropy,
    linear_log_probs,
    linear_scores,
    rms_norm,
    silu_mul,
)
from kernels.cross_entropy import block_rows
from tests.gpu_path.driver import Machine

# Values by option. The first one is what is taken where it does not matter, and so should be quick to compile.
Options = Mapping[str, tuple[Any, ...]]
Launches = dict[str, int]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Kernels of a call, forward and backward.
ATTENTION_FORWARD = ("attention.forward.forward_kernel",)
ATTENTION_BACKWARD = tuple(f"attention.backward.{name}_kernel" for name in ("delta", "dq", "dk_dv"))
DECODE_KERNEL, MERGE_KERNEL = (f"attention.decode.{name}_kernel" for name in ("decode", "merge"))
NORM_FORWARD = ("norm_triton.forward_kernel",)
NORM_BACKWARD = ("norm_triton.backward_kernel", "norm_triton.sum_kernel")
SILU_MUL = "silu_mul_triton.silu_mul_kernel"
ROWS_KERNEL = "cross_entropy_triton.rows_kernel"


def covering(options: Options) -> list[dict[str, Any]]:
    """Return few cases in which any two values of two options meet. Greedy: each takes what most is missing of."""
    missing = dict.fromkeys(
        ((one, i), (other, j))
        for one, other in combinations(options, 2)
        for i in range(len(options[one]))
        for j in range(len(options[other]))
    )
    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for option, values in options.items():
            if option not in case:

                def met(place: int, option: str = option, case: dict[str, int] = case) -> int:
                    here = (option, place)
                    return sum((each, here) in missing or (here, each) in missing for each in case.items())

                case[option] = max(range(len(values)), key=met)
        for pair in combinations(((option, case[option]) for option in options), 2):
            missing.pop(pair, None)
        cases.append({option: values[case[option]] for option, values in options.items()})
    return cases


def with_news(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cases that have a value of an option which none before them had."""
    seen: set[tuple[str, Any]] = set()
    found = []
    for case in cases:
        if not seen.issuperset(case.items()):
            found.append(case)
            seen.update(case.items())
    return found


def tensor(memory: str, *shape: int, dtype: torch.dtype = FP32, grad: bool = True) -> Tensor:
    """Return a tensor of zeros; "part": every third of its heads or columns; "odd": it begins beside a multiple of 16.

    "turned" has its last dimension first in memory.
    """
    if memory == "part":
        return torch.zeros(*shape[:-2], 3 * shape[-2], shape[-1], dtype=dtype, device="cuda", requires_grad=grad)[
            ..., : shape[-2], :
        ]
    if memory == "odd":
        return torch.zeros(math.prod(shape) + 1, dtype=dtype, device="cuda", requires_grad=grad)[1:].view(shape)
    if memory == "turned":
        return torch.zeros(shape[::-1], dtype=dtype, device="cuda", requires_grad=grad).permute(
            *range(len(shape))[::-1]
        )
    return torch.zeros(shape, dtype=dtype, device="cuda", requires_grad=grad)


def backward(results: list[Tensor], inputs: list[Tensor | None]) -> None:
    total = torch.stack([each.float().sum() for each in results]).sum()
    torch.autograd.grad(total, [each for each in inputs if each is not None])


ATTENTION: Options = {
    "head_dim": (64, 32, 128, 256, 80, 20),
    "memory": ("whole", "part", "odd"),
    "dtype": (BF16, FP16, FP32),
    "layout": ("dense", "packed", "packed, int64, lengths unknown"),
    "lengths": ((2000, 2048), (64, 64), (1, 37)),
    "causal": (True, False),
    "window": (None, 20),
    "softcap": (None, 30.0),
    "scale": (None, 0.5),
    "heads": ((2, 2), (6, 2)),
    "return_lse": (False, True),
}


def attention(
    machine: Machine, *, head_dim: int, memory: str, dtype: torch.dtype, layout: str, lengths: tuple[int, int],
    heads: tuple[int, int], return_lse: bool, **options: Any,
) -> Launches:  # fmt: skip
    dense, sequences = layout == "dense", 3
    for side, length in zip("qk", () if dense else lengths, strict=False):
        counts = torch.arange(sequences + 1, device="cuda") * length
        options[f"cu_seqlens_{side}"] = counts if "int64" in layout else counts.int()
        if "unknown" not in layout:
            options[f"max_seqlen_{side}"] = length
    shapes = [(sequences, length) if dense else (sequences * length,) for length in lengths]
    q = tensor(memory, *shapes[0], heads[0], head_dim, dtype=dtype)
    k = tensor("turned" if memory == "odd" else memory, *shapes[1], heads[1], head_dim, dtype=dtype)
    v = tensor(memory, *shapes[1], heads[1], head_dim, dtype=dtype)
    results = flash_attention(q, k, v, return_lse=return_lse, **options)
    backward(list(results) if return_lse else [results], [q, k, v])  # type: ignore[list-item]
    if memory == "odd" or head_dim * dtype.itemsize % 16:
        assert not any(launch.scratch for launch in machine.launches), "a descriptor of rows that it cannot describe"
    return dict.fromkeys((*ATTENTION_FORWARD, *ATTENTION_BACKWARD), 1)


DECODE: Options = {
    "head_dim": (64, 32, 128, 256, 80),
    "tokens": (1, 3, 16, 20),
    "dtype": (BF16, FP16, FP32),
    "cache": ("dense", "heads first", "paged", "paged by a part of a table"),
    "room": (64, 4096),
    "window": (None, 20, 10**6),
    "softcap": (None, 30.0),
    "heads": ((2, 2), (8, 2)),
    "int64": (True, False),
    "memory": ("whole", "part", "turned"),
}


def decode(
    *, head_dim: int, tokens: int, dtype: torch.dtype, cache: str, room: int, heads: tuple[int, int], int64: bool,
    memory: str, **options: Any,
) -> Launches:  # fmt: skip
    batch, page = 2, 16
    q = tensor(memory, batch, tokens, heads[0], head_dim, dtype=dtype, grad=False)
    lengths = torch.full((batch,), tokens, device="cuda", dtype=torch.int64 if int64 else torch.int32)
    shape = (batch, room, heads[1], head_dim)
    if cache.startswith("paged"):
        shape = (batch * room // page, page, heads[1], head_dim)
        table = torch.zeros(batch, 2 * room // page, dtype=torch.int32, device="cuda")
        options["block_table"] = table[:, ::2] if "part" in cache else table[:, : room // page]
    if cache == "heads first":
        k, v = (torch.zeros(batch, heads[1], room, head_dim, dtype=dtype, device="cuda").transpose(1, 2) for _ in "kv")
    else:
        k, v = (torch.zeros(shape, dtype=dtype, device="cuda") for _ in "kv")
    with torch.inference_mode():
        decode_attention(q, k, v, lengths, **options)
    # A long cache is split among programs.
    return dict.fromkeys((DECODE_KERNEL, MERGE_KERNEL) if room > 1000 else (DECODE_KERNEL,), 1)


NORM: Options = {
    "function": (layer_norm, rms_norm),
    "width": (512, 1, 100, 4096, 9000, 16384),
    "dtype": (BF16, FP16, FP32),
    "kept_in": (FP32, None),
    "rows": (37, 1, 0),
    "bias": (False, True),
    "used": ("normalised", "sum", "both"),
    "residual": (True, False),
    "memory": ("whole", "odd", "turned"),
}


def norm(
    *, function: Any, width: int, dtype: torch.dtype, kept_in: torch.dtype | None, rows: int, bias: bool, used: str,
    residual: bool, memory: str,
) -> Launches:  # fmt: skip
    x = tensor(memory, rows, width, dtype=dtype)
    other = tensor("whole", rows, width, dtype=dtype) if residual else None
    weight = tensor("whole", width, dtype=kept_in or dtype)
    shift = tensor("whole", width, dtype=kept_in or dtype) if bias and function is layer_norm else None
    found = function(x, weight, *([] if shift is None else [shift]), residual=other)
    results = list(found) if residual else [found]
    chosen = {"normalised": results[:1], "sum": results[-1:], "both": results}[used]
    backward(chosen, [x, other, weight, shift])
    # The sum of nothing is written too.
    return dict.fromkeys((*NORM_FORWARD, *NORM_BACKWARD) if rows else NORM_BACKWARD[1:], 1)


ACTIVATION: Options = {
    "width": (1536, 1, 100, 14336),
    "dtype": (BF16, FP16, FP32),
    "rows": (37, 1, 0),
    "memory": ("whole", "odd", "turned"),
}


def activation(*, width: int, dtype: torch.dtype, rows: int, memory: str) -> Launches:
    x = tensor(memory, rows, 2 * width, dtype=dtype)
    backward([silu_mul(x)], [x])
    return {SILU_MUL: 2} if rows else {}


LOSS: Options = {
    "vocab": (4096, 100, 4099, 50257),
    "dtype": (BF16, FP16, FP32),
    "kept_in": (FP32, None),
    "rows": (37, 1, 300),
    "reduction": ("mean", "sum", "none"),
    "softcap": (None, 30.0),
    "z_loss": (0.0, 1e-4),
    "ignore_index": (-100, 7),
    "grad": (True, False),
    "targets": ("whole", "part"),
    "memory": ("whole", "odd", "turned"),
}


def products(
    vocab: int, dtype: torch.dtype, kept_in: torch.dtype | None, rows: int, targets: str, memory: str, grad: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return hidden [rows, C], weight [vocab, C], targets [rows], and in how many blocks the rows are taken."""
    hidden = tensor(memory, rows, 16, dtype=dtype, grad=grad)
    weight = tensor("whole", vocab, 16, dtype=kept_in or dtype, grad=grad)
    ids = torch.zeros(rows + 1, dtype=torch.int64, device="cuda")
    blocks = -(-rows // block_rows(rows, vocab, dtype.itemsize, gpu=True))
    return hidden, weight, ids[1:] if targets == "part" else ids[:rows], blocks


def loss(
    *, vocab: int, dtype: torch.dtype, kept_in: torch.dtype | None, rows: int, targets: str, memory: str, grad: bool,
    **options: Any,
) -> Launches:  # fmt: skip
    hidden, weight, ids, blocks = products(vocab, dtype, kept_in, rows, targets, memory, grad)
    result = linear_cross_entropy(hidden, weight, ids, **options)
    if grad:
        backward([result], [hidden, weight])
    # Where each row's loss is asked for, logits are made once more on the way back.
    return {ROWS_KERNEL: blocks * (2 if grad and options["reduction"] == "none" else 1)}


LOG_PROBS: Options = {
    "vocab": (4096, 100, 50257),
    "dtype": (BF16, FP16, FP32),
    "temperature": (1.0, 0.7),
    "softcap": (None, 30.0),
    "used": ("both", "log_probs", "entropy", "neither"),
    "rows": (37, 300),
}


def log_probs(
    *, vocab: int, dtype: torch.dtype, temperature: float, softcap: float | None, used: str, rows: int
) -> Launches:
    grad = used != "neither"
    hidden, weight, ids, blocks = products(vocab, dtype, FP32, rows, "whole", "whole", grad)
    found = list(linear_log_probs(hidden, weight, ids, temperature, softcap=softcap))
    if grad:
        backward({"log_probs": found[:1], "entropy": found[1:]}.get(used, found), [hidden, weight])
    return {ROWS_KERNEL: blocks * (1 + grad)}


SCORES: Options = {"dtype": (BF16, FP16, FP32), "grad": (True, False), "out": (False, True)}


def scores(*, dtype: torch.dtype, grad: bool, out: bool) -> Launches:
    hidden, weight, _, _ = products(100, dtype, FP32, 37, "whole", "whole", grad and not out)
    with torch.set_grad_enabled(grad):
        found = linear_scores(hidden, weight, torch.empty(37, 100, device="cuda") if out else None)
        assert found.dtype == FP32
        if grad and not out:
            backward([found], [hidden, weight])
    return {}


def changing() -> Launches:
    """Calls that differ in one thing from a call before: where a tensor begins, a stride, a number that is too long."""
    shape, parts = (2, 16, 2, 32), dict[str, Any](dtype=BF16, grad=False)
    usual, odd = tensor("whole", *shape, **parts), tensor("odd", *shape, **parts)
    q_kv = ((usual, usual), (odd, usual), (usual, odd), (tensor("whole", 2, 16, 2, 40, **parts)[..., :32], usual))
    lengths = torch.ones(2, dtype=torch.int32, device="cuda")
    for q, kv in q_kv:
        flash_attention(q, kv, kv, window=20)
        decode_attention(q, kv, kv, lengths)
    for window in (1, 2**31, 2**40):
        flash_attention(usual, usual, usual, window=window)
    weight = tensor("whole", 512, grad=False)
    for memory in ("whole", "odd"):
        layer_norm(tensor(memory, 37, 512, **parts), weight)
    return {ATTENTION_FORWARD[0]: 7, DECODE_KERNEL: 4, NORM_FORWARD[0]: 2}


def many() -> Launches:
    """More sequences and rows than CUDA takes on the second axis of a grid."""
    count = 70_000
    q = tensor("whole", count, 1, 32, dtype=BF16)
    bounds = torch.arange(count + 1, dtype=torch.int32, device="cuda")
    packed = dict[str, Any](cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=1, max_seqlen_k=1)
    backward([flash_attention(q, q, q, **packed)], [q])  # type: ignore[list-item]
    with torch.inference_mode():
        decode_attention(q[:, None], q[:, None], q[:, None], bounds[1:])
    x, weight = tensor("whole", count, 32), tensor("whole", 32)
    backward([layer_norm(x, weight)], [x, weight])  # type: ignore[list-item]
    backward([silu_mul(x)], [x])
    loss = linear_cross_entropy(x, tensor("whole", 16, 32), torch.zeros(count, dtype=torch.int64, device="cuda"))
    once = (*ATTENTION_FORWARD, *ATTENTION_BACKWARD, *NORM_FORWARD, *NORM_BACKWARD, DECODE_KERNEL)
    # A block of logits has at most 32 MiB.
    return dict.fromkeys(once, 1) | {
        SILU_MUL: 2,
        ROWS_KERNEL: -(-count // block_rows(count, 16, loss.itemsize, gpu=True)),
    }


def calls(machine: Machine) -> Iterator[tuple[str, Callable[[], Launches]]]:
    """Yield all of them, by names that tell their options."""
    functions: dict[str, tuple[Callable[..., Launches], Options]] = {
        "attention": (partial(attention, machine), ATTENTION),
        "decode": (decode, DECODE),
        "norm": (norm, NORM),
        "activation": (activation, ACTIVATION),
        "loss": (loss, LOSS),
        "log_probs": (log_probs, LOG_PROBS),
        "scores": (scores, SCORES),
    }
    for name, (function, options) in functions.items():
        # On older architectures tiles are others, but launches are the same: there each value is taken once.
        cases = covering(options) if machine.architecture >= 90 else with_news(covering(options))
        for case in cases:
            said = ", ".join(f"{option}={value}".replace("torch.", "") for option, value in case.items())
            yield f"{name}: {said}", partial(function, **case)
    yield "calls that change", changing
    yield "many sequences", many
