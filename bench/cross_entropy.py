"""The last layer and its loss, forward and backward, against plain PyTorch: time, and the memory it takes at its peak.

The weight is kept in fp32 and multiplied in the precision of the run, as in training. Memory is what a call adds to its
arguments: the gradients, which it leaves behind, included.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import TOLERANCE, median_seconds, outcome
from engine.runtime import Runtime, synchronize
from kernels import linear_cross_entropy
from kernels.backend import backend

# Vocabulary and width: the presets nano and tiny, then Llama 3's vocabulary with the width of its 1B and 8B models.
SHAPES = {
    "cuda": ((4096, 128), (28000, 256), (128256, 2048), (128256, 4096)),
    "cpu": ((4096, 128), (28000, 256), (128256, 256)),
}
TOKENS = {"cuda": 16384, "cpu": 2048}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The softmax in fp32, as autocast has it."""
    return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)).float(), targets)


def plain_half(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All in half precision: less memory and time for a loss of three digits."""
    return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)), targets)


def losses(runtime: Runtime) -> list[dict[str, Loss]]:
    """What is compared, by name: those of a group take turns. The one that takes time to compile comes last."""
    eager: dict[str, Loss] = {"ours": linear_cross_entropy, "plain": plain}
    if runtime.precision != "fp32":
        eager["half"] = plain_half
    # Compiled for each shape alone: dynamic shapes are slower.
    return [eager, {"compiled": torch.compile(plain, dynamic=False)}] if runtime.device.type == "cuda" else [eager]


def bench_cross_entropy(
    runtime: Runtime, *, shapes: Sequence[tuple[int, int]], tokens: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """The result so far, after every shape. Times are medians of `rounds`, taken in turn; a reason where there is none.

    `seconds` is forward and backward, `forward_seconds` forward alone where no gradient is wanted.
    """
    result: dict[str, Any] = {
        "precision": runtime.precision,
        "backend": backend(runtime.device),
        "tokens": tokens,
        "shapes": [{"vocab": vocab, "width": width, "figures": {}} for vocab, width in shapes],
    }
    for group in losses(runtime):
        verdicts = {name: outcome(check, loss, runtime) for name, loss in group.items()}
        for shape in result["shapes"]:
            torch.compiler.reset()  # it compiles one function only so many times
            shape["figures"] |= _figures(group, verdicts, (tokens, shape["vocab"], shape["width"]), rounds, runtime)
            yield result


def _figures(
    group: dict[str, Loss],
    verdicts: dict[str, dict[str, Any]],
    size: tuple[int, int, int],
    rounds: int,
    runtime: Runtime,
) -> dict[str, dict[str, Any]]:
    figures = {name: dict(verdict) for name, verdict in verdicts.items()}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in group}
    arguments = inputs(*size, runtime)
    for _ in range(rounds):
        for name, loss in group.items():
            if "reason" not in figures[name]:
                found = outcome(timed, loss, arguments, runtime)
                if "reason" in found:
                    figures[name] = found
                taken[name].append(found)
    del arguments
    for name, each in figures.items():
        if "reason" not in each:
            each |= {kind: statistics.median(times[kind] for times in taken[name]) for kind in taken[name][0]}
            each["peak_bytes"] = peak_memory(name, size, runtime)
    return figures


def inputs(tokens: int, vocab: int, width: int, runtime: Runtime) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets: random, with logits of the size of one."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=runtime.device, dtype=runtime.dtype)
    weight = torch.randn(vocab, width, device=runtime.device).mul_(width**-0.5)  # a copy would count as memory before
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (tokens,), device=runtime.device)


def step(loss: Loss, arguments: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The loss and its two gradients."""
    value = loss(*arguments)
    return [value.detach(), *torch.autograd.grad(value, arguments[:2])]


def check(loss: Loss, runtime: Runtime) -> dict[str, float]:
    """The largest relative error, against float64. Raises ArithmeticError for one that rounding does not explain."""
    hidden, weight, targets = inputs(256, 1000, 64, runtime)
    # What is left of the weight in the precision of the run is what is multiplied.
    rounded = weight.detach().to(hidden.dtype)
    wide = [each.detach().double().requires_grad_() for each in (hidden, rounded)]
    exact = step(plain_half, (wide[0], wide[1], targets))
    found = step(loss, (hidden, weight, targets))
    error = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))
    if not error <= TOLERANCE[runtime.precision]:
        raise ArithmeticError(f"wrong: the relative error is {error:.2g}")
    return {"relative_error": error}


def timed(loss: Loss, arguments: tuple[Tensor, Tensor, Tensor], runtime: Runtime) -> dict[str, float]:
    def forward() -> Tensor:
        with torch.no_grad():
            return loss(*arguments)

    return {
        "seconds": _seconds(lambda: step(loss, arguments), runtime.device),
        "forward_seconds": _seconds(forward, runtime.device),
    }


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        return median_seconds(function, device)
    # One call: seconds long, and the peers want to take turns.
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def peak_memory(name: str, size: tuple[int, int, int], runtime: Runtime) -> int:
    """The most bytes that a forward and backward pass holds beyond its arguments; on a CPU, in a process of its own."""
    if runtime.device.type == "cuda":
        return _peak_memory(name, size, runtime, torch.get_num_threads())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (name, size, runtime, torch.get_num_threads()))


def _peak_memory(name: str, size: tuple[int, int, int], runtime: Runtime, threads: int) -> int:
    torch.set_num_threads(threads)
    loss = next(group[name] for group in losses(runtime) if name in group)
    on_gpu = runtime.device.type == "cuda"
    # What libraries keep is not counted. A GPU's peak can be reset; a process has one peak, so that little must do.
    step(loss, inputs(*(size if on_gpu else (256, 256, 64)), runtime))
    arguments = inputs(*size, runtime)
    synchronize(runtime.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(runtime.device)
    before = runtime.peak_memory()
    step(loss, arguments)
    synchronize(runtime.device)
    return runtime.peak_memory() - before
