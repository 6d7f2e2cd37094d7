"""The memory that a step takes, as the allocator counts it."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Step = Callable[[], None]


def peak_bytes(build: Callable[[], Step], steps: int = 2) -> int:
    """The most that a step holds at a time, on a CPU, with what was built for it.

    The profiler hears every allocation and every release, what operators take for themselves included; a mode for
    dispatched tensors sees only what they return, and a process's resident memory also what is free by then.
    What an earlier test left in a cycle goes first: released in here, it would count as less held.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step = build()
        with record_function("steps"):
            for _ in range(steps):
                step()
    events = recorded.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == "steps")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for when, change in changes:
        held += change
        peak = max(peak, held) if when >= begin else held
    return peak


def packed(tokens: int, vocab: int, context: int) -> dict[str, Any]:
    """A batch of documents half a context long."""
    batch = torch.randint(0, vocab, (tokens,))
    bounds = torch.arange(0, tokens + 1, context // 2, dtype=torch.int32)
    return {"tokens": batch, "targets": batch.roll(-1), "cu_seqlens": bounds}
