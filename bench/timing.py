"""How long a function takes, and the best that copying does here (for products: engine.runtime.measured_peak)."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

# Relative error, |x - exact| / |exact|, above which a result is wrong, not rounded. tf32 is allowed for fp32.
TOLERANCE = {"fp32": 2e-3, "fp16": 5e-3, "bf16": 2e-2}


def median_seconds(function: Callable[[], Any], device: torch.device, *, budget_ms: float = 100) -> float:
    """Median seconds of one call, warmed up and repeated for about `budget_ms`, at least once.

    On a GPU: time on the device, with the L2 cache emptied before each call (triton.testing.do_bench). Launches are in
    it only where the host is slower than the device. On a CPU: wall time with all of torch's threads.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        with torch.cuda.device(device):
            return do_bench(function, warmup=budget_ms / 4, rep=budget_ms, return_mode="median") / 1000
    from torch.utils.benchmark import Timer

    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=budget_ms / 1000).median


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a copy much larger than any cache."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def outcome(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, Any]:
    """What it measures, or the reason why it cannot."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return measure(*arguments)
        except Exception as error:  # whatever a peer raises, the other figures are still wanted
            # PyTorch says in warnings why it refuses a backend, and in the error only that it does.
            parts = [f"{type(error).__name__}: {error}", *(str(each.message) for each in said)]
            return {"reason": "; ".join(dict.fromkeys(part.splitlines()[0][:200] for part in parts if part))[:600]}
