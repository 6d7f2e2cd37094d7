"""Attention, ours and its peers in one process: forward and backward, each in FLOP/s.

Forward is timed without a gradient. Backward is `torch.autograd.grad` on a graph that is kept: timed by itself, not as
the difference of two times. Either is compared with float64 at a small size before it gets a figure.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import TOLERANCE, copy_bandwidth, median_seconds, outcome
from engine.runtime import Runtime, measured_peak
from kernels import flash_attention
from kernels.attention.reference import attention_reference
from kernels.backend import backend

WIDTH = 2048  # heads times head dim
HEAD_DIMS = (32, 64, 128)
LENGTHS = {"cuda": (512, 1024, 2048, 4096, 8192, 16384), "cpu": (128, 256, 512, 1024)}
# Batch times length. A CPU gets through fewer in the two or three minutes that a run should take.
TOKENS = {"cuda": 16384, "cpu": 1024}
DIRECTIONS = ("forward", "backward")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    head_dim: int
    causal: bool
    length: int
    batch: int
    width: int = WIDTH

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    def flops(self, direction: str) -> float:
        """Of the matrix products alone; the backward has five where the forward has two."""
        forward = 4 * self.batch * self.length**2 * self.width / (2 if self.causal else 1)
        return forward if direction == "forward" else 2.5 * forward


@contextmanager
def ours(shape: Shape, device: torch.device) -> Iterator[Attend]:
    yield lambda q, k, v: cast(Tensor, flash_attention(q, k, v, causal=shape.causal))


@contextmanager
def plain(shape: Shape, device: torch.device) -> Iterator[Attend]:
    scores_bytes = 4 * shape.batch * shape.heads * shape.length**2
    # A GPU says that it has no more memory; on a CPU the system would end the process.
    if device.type == "cpu" and 4 * scores_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        raise MemoryError(f"the score matrices take {scores_bytes / 2**30:.0f} GiB each")
    hidden = torch.ones(shape.length, shape.length, dtype=torch.bool, device=device).triu(1) if shape.causal else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * shape.head_dim**-0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores.softmax(-1) @ v

    yield attend


def sdpa(name: str) -> "Provider":
    @contextmanager
    def provider(shape: Shape, device: torch.device) -> Iterator[Attend]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, name)):
            yield lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)

    return provider


@contextmanager
def flex(shape: Shape, device: torch.device) -> Iterator[Attend]:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Compiled for this shape alone: dynamic shapes are slower, and torch compiles one function only so many times.
    torch.compiler.reset()
    run = torch.compile(flex_attention, dynamic=False)
    mask = None
    if shape.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, shape.length, shape.length, device=str(device))
    # A compiled backward may else write over what it reads, and could run only once.
    with torch._functorch.config.patch(donated_buffer=False):
        yield lambda q, k, v: run(q, k, v, block_mask=mask)


Provider = Callable[[Shape, torch.device], AbstractContextManager[Attend]]
PROVIDERS: dict[str, Provider] = {
    "ours": ours,
    "plain": plain,
    "flash": sdpa("FLASH_ATTENTION"),
    "efficient": sdpa("EFFICIENT_ATTENTION"),
    "cudnn": sdpa("CUDNN_ATTENTION"),
    "flex": flex,
}


def bench_attention(
    runtime: Runtime,
    *,
    head_dims: Sequence[int] = HEAD_DIMS,
    lengths: Sequence[int] = LENGTHS["cuda"],
    masks: Sequence[bool] = (True, False),
    tokens: int = TOKENS["cuda"],
    providers: Sequence[str] = tuple(PROVIDERS),
) -> Iterator[dict[str, Any]]:
    """The result so far, after every point: `checks` per head dim and mask, `points` per length.

    Either holds, per direction and provider, figures or the `reason` why there are none. Causal (True in `masks`) comes
    first. Seconds are medians; `flops_per_second` counts matrix products alone.
    """
    result: dict[str, Any] = {
        "precision": runtime.precision,
        "backend": backend(runtime.device),
        "peak_flops": measured_peak(runtime),
        "copy_bytes_per_second": copy_bandwidth(runtime.device),
        "checks": [],
        "points": [],
    }
    for causal in masks:
        for head_dim in head_dims:
            small = Shape(head_dim, causal, length=512, batch=1, width=512)
            verdicts = {
                direction: {name: outcome(check, name, small, direction, runtime) for name in providers}
                for direction in DIRECTIONS
            }
            result["checks"].append({"head_dim": head_dim, "causal": causal, **verdicts})
            for length in lengths:
                shape = Shape(head_dim, causal, length, tokens // length)
                figures = {
                    direction: {
                        name: verdict if "reason" in verdict else outcome(timed, name, shape, direction, runtime)
                        for name, verdict in verdicts[direction].items()
                    }
                    for direction in DIRECTIONS
                }
                result["points"].append({**vars(shape), "heads": shape.heads, **figures})
                yield result


def check(name: str, shape: Shape, direction: str, runtime: Runtime) -> dict[str, float]:
    """The relative error, against float64. Raises ArithmeticError for one that rounding does not explain."""
    tensors = inputs(name, shape, runtime)
    with PROVIDERS[name](shape, runtime.device) as attend:
        found = prepare(attend, tensors, direction)()

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return swapped(name, attention_reference(*(swapped(name, each) for each in (q, k, v)), causal=shape.causal)[0])

    truth = prepare(exact, [each.double() for each in tensors], direction)()
    error = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True))
    # Not `>`: NaN is wrong too.
    if not error <= TOLERANCE[runtime.precision]:
        raise ArithmeticError(f"wrong: the relative error of the {direction} is {error:.2g}")
    return {"relative_error": error}


def timed(name: str, shape: Shape, direction: str, runtime: Runtime) -> dict[str, float]:
    tensors = inputs(name, shape, runtime)
    with PROVIDERS[name](shape, runtime.device) as attend:
        seconds = median_seconds(prepare(attend, tensors, direction), runtime.device)
    return {"seconds": seconds, "flops_per_second": shape.flops(direction) / seconds}


def prepare(attend: Attend, tensors: Sequence[Tensor], direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """A function of no arguments: to (out,), or to (dq, dk, dv) of a graph that it keeps."""
    *leaves, d_out = tensors
    if direction == "forward":
        return lambda: (attend(*leaves),)
    leaves = [each.detach().requires_grad_() for each in leaves]
    out = attend(*leaves)
    return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)


def inputs(name: str, shape: Shape, runtime: Runtime) -> list[Tensor]:
    """Random q, k, v, d_out, dense in the layout of the provider."""
    size = (shape.batch, shape.length, shape.heads, shape.head_dim)
    drawn = (torch.randn(size, device=runtime.device, dtype=runtime.dtype) for _ in range(4))
    return [swapped(name, each).contiguous() for each in drawn]


def swapped(name: str, tensor: Tensor) -> Tensor:
    """[B, T, H, D] is the layout of ours, [B, H, T, D] that of the peers: from the first to the provider's, or back."""
    return tensor if name == "ours" else tensor.transpose(1, 2)


COLORS = {
    "ours": "#c2410c",
    "cudnn": "#166534",
    "flash": "#1d4ed8",
    "flex": "#7e22ce",
    "efficient": "#0891b2",
    "plain": "#6b7280",
}


def unit(runtime: Runtime) -> tuple[str, float]:
    """What figures are given in, and how many FLOP/s that is."""
    return ("TFLOP/s", 1e12) if runtime.device.type == "cuda" else ("GFLOP/s", 1e9)


def plot(result: dict[str, Any], runtime: Runtime, title: str, path: Path) -> list[Path]:
    """Beside `path` NAME-causal.png and NAME-full.png, as far as measured; none where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    name_of_unit, scale = unit(runtime)
    written = []
    for mask in (True, False):
        points = [point for point in result["points"] if point["causal"] == mask]
        dims = sorted({point["head_dim"] for point in points})
        if not points:
            continue
        figure, grid = pyplot.subplots(
            2, len(dims), figsize=(1.5 + 3.6 * len(dims), 6.5), layout="constrained", squeeze=False, sharey="row"
        )
        lines = {}
        for column, dim in enumerate(dims):
            for row, direction in enumerate(DIRECTIONS):
                axes = grid[row][column]
                mine = sorted((p for p in points if p["head_dim"] == dim), key=lambda p: p["length"])
                for name in reversed(COLORS):
                    drawn = [
                        (p["length"], p[direction][name]["flops_per_second"] / scale)
                        for p in mine
                        if "flops_per_second" in p[direction].get(name, {})
                    ]
                    if drawn:
                        width = 2.4 if name == "ours" else 1.3
                        (lines[name],) = axes.plot(*zip(*drawn, strict=True), "o-", color=COLORS[name], lw=width, ms=4)
                lengths = [point["length"] for point in mine]
                axes.set_xscale("log", base=2)
                axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
                axes.set_xticks([], minor=True)
                axes.grid(alpha=0.25)
                axes.set_title(f"{direction}, head dim {dim}", fontsize=10)
            grid[1][column].set_xlabel("length")
        for row in range(2):
            # Once all of a row is drawn, whose panels share their limits: to set one settles the other.
            grid[row][0].set_ylim(bottom=0)
            grid[row][0].set_ylabel(name_of_unit)
        figure.suptitle(f"{'causal' if mask else 'full'} attention, {title}", fontsize=11)
        names = [name for name in COLORS if name in lines]
        figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=6, frameon=False)
        written.append(path.with_name(f"{path.stem}-{'causal' if mask else 'full'}.png"))
        figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    return written
