"""Which implementation of the kernels runs: "triton" or "torch"."""

import os
from functools import cache

import torch


@torch.compiler.assume_constant_result
def backend(device: torch.device) -> str:
    """ "triton" on a CUDA device on which a Triton kernel really ran, else "torch". GPT_KERNELS=torch|triton overrides.

    On a CPU Triton runs only interpreted (TRITON_INTERPRET=1): slowly, for tests. Raises ValueError for another name.
    """
    asked = os.environ.get("GPT_KERNELS", "")
    if asked not in ("", "torch", "triton"):
        raise ValueError(f"GPT_KERNELS is {asked!r}; expected torch or triton")
    if asked:
        return asked
    return "triton" if device.type == "cuda" and why_not_triton(device) is None else "torch"


@cache
def why_not_triton(device: torch.device) -> str | None:
    """None where a probe kernel ran on the device and gave the right answer, else the reason."""
    try:
        from kernels.probe import probe

        return probe(device)
    except Exception as error:  # a missing package, compiler or driver, each with errors of its own
        return f"{type(error).__name__}: {error}"
