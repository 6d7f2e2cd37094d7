"""How long a function takes, and the best that copying does here (for products: engine.runtime.measured_peak)."""

from collections.abc import Callable
from typing import Any

import torch


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
