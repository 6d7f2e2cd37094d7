"""LayerNorm, ours and its peers in one process: forward and backward, in bytes per second and as a share of a copy.

The bytes are those that must move. Forward: x is read, y written. Backward: dy and x are read, dx written. With the
residual addition one tensor more is read, and in the forward one more written. Backward is timed by itself, on a graph
that is kept. A function has a figure only if its results are near those of float64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import TOLERANCE, copy_bandwidth, median_seconds, outcome
from engine.runtime import Runtime
from kernels import layer_norm
from kernels.backend import backend

WIDTHS = {"cuda": (256, 512, 768, 1024, 2048, 4096), "cpu": (256, 768, 1024)}
ROWS = {"cuda": 16384, "cpu": 4096}
DIRECTIONS = ("forward", "backward")

# x and weight, or x, weight and residual, to (y,) or (y, x + residual)
Norm = Callable[..., tuple[Tensor, ...]]


def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
    out = layer_norm(x, weight, residual=residual)
    return out if isinstance(out, tuple) else (out,)


def plain(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
    if residual is None:
        return (F.layer_norm(x, weight.shape, weight),)
    summed = x + residual
    return F.layer_norm(summed, weight.shape, weight), summed


def compiled() -> Norm:
    # Compiled for one shape alone: dynamic shapes are slower, and torch compiles one function only so many times.
    torch.compiler.reset()
    return torch.compile(plain, dynamic=False)


PROVIDERS: dict[str, Callable[[], Norm]] = {"ours": lambda: ours, "torch": lambda: plain, "compiled": compiled}


@dataclass(frozen=True)
class Case:
    """What goes in, and the gradients of what comes out."""

    arguments: list[Tensor]
    directions: list[Tensor]

    def moved(self, direction: str) -> int:
        """Bytes that must go through memory, but for the parameters' few."""
        tensors = {"forward": 2 * len(self.directions), "backward": 2 + len(self.directions)}[direction]
        return tensors * self.arguments[0].nbytes

    def double(self) -> "Case":
        return Case([each.double() for each in self.arguments], [each.double() for each in self.directions])


def bench_layernorm(
    runtime: Runtime, *, widths: Sequence[int], rows: int, providers: Sequence[str] = tuple(PROVIDERS)
) -> Iterator[dict[str, Any]]:
    """The result so far, after every point: one per width, without and with the residual, figures per provider.

    Seconds are medians; `share` is what a copy that moves as many bytes takes, timed beside, over those seconds. Where
    there are no figures there is the `reason`.
    """
    result: dict[str, Any] = {
        "precision": runtime.precision,
        "backend": backend(runtime.device),
        "rows": rows,
        "copy_bytes_per_second": copy_bandwidth(runtime.device),
        "points": [],
    }
    for width in widths:
        for residual in (False, True):
            case = draw(rows, width, residual, runtime)
            point: dict[str, Any] = {"width": width, "residual": residual}
            for direction in DIRECTIONS:
                copy = copy_seconds(case.moved(direction), runtime)
                point[direction] = {name: outcome(measure, name, case, direction, copy, runtime) for name in providers}
            result["points"].append(point)
            yield result


def draw(rows: int, width: int, residual: bool, runtime: Runtime) -> Case:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=runtime.device, dtype=runtime.dtype)

    arguments = [random(rows, width), random(width)] + ([random(rows, width)] if residual else [])
    return Case(arguments, [random(rows, width) for _ in range(1 + residual)])


def copy_seconds(moved: int, runtime: Runtime) -> float:
    source = torch.randn(moved // 2 // runtime.dtype.itemsize, device=runtime.device, dtype=runtime.dtype)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), runtime.device)


def measure(name: str, case: Case, direction: str, copy: float, runtime: Runtime) -> dict[str, float]:
    import torch._functorch.config

    # A compiled backward may else write over what it reads, and could run only once.
    with torch._functorch.config.patch(donated_buffer=False):
        function = prepare(PROVIDERS[name](), case, direction)
        exact = prepare(plain, case.double(), direction)()
        error = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(function(), exact, strict=True))
        # Not `>`: NaN is wrong too.
        if not error <= TOLERANCE[runtime.precision]:
            raise ArithmeticError(f"wrong: the relative error of the {direction} is {error:.2g}")
        seconds = median_seconds(function, runtime.device)
    rate = case.moved(direction) / seconds
    return {"relative_error": error, "seconds": seconds, "bytes_per_second": rate, "share": copy / seconds}


def prepare(norm: Norm, case: Case, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """A function of no arguments: to the results, or to the gradients of a graph that it keeps."""
    if direction == "forward":
        return lambda: norm(*case.arguments)
    leaves = [each.detach().requires_grad_() for each in case.arguments]
    out = norm(*leaves)
    return lambda: torch.autograd.grad(out, leaves, case.directions, retain_graph=True)


COLORS = {"ours": "#c2410c", "torch": "#1d4ed8", "compiled": "#7e22ce"}


def plot(result: dict[str, Any], title: str, path: Path) -> bool:
    """Shares over widths, into a PNG; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axes, direction in zip(panels, DIRECTIONS, strict=True):
        for residual in (False, True):
            for name, color in COLORS.items():
                points = [point for point in result["points"] if point["residual"] == residual]
                line = [
                    (point["width"], 100 * point[direction][name]["share"])
                    for point in points
                    if "share" in point[direction].get(name, {})
                ]
                label = f"{name}, residual added" if residual else name
                if line:
                    axes.plot(*zip(*line, strict=True), "o--" if residual else "o-", color=color, ms=4, label=label)
        widths = sorted({point["width"] for point in result["points"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.set_title(direction, fontsize=10)
        axes.set_xlabel("width")
    panels[0].set_ylabel("% of a copy's speed")
    panels[1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"LayerNorm, {result['rows']:,} rows, {title}", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
