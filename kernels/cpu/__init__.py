"""What Numba compiles for a CPU: a whole model's step of decoding with the next token's choice, and short attention.

Importing a file of this package imports Numba. `why_not` says beforehand whether that is any use.
"""

import os
from functools import cache

import torch


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None where these kernels can compute, else the reason why the torch backend does instead."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} on {device.type}"
    asked = os.environ.get("GPT_KERNELS")
    return f"GPT_KERNELS is {asked}" if asked else _why_not_numba()


@cache
def _why_not_numba() -> str | None:
    try:
        from kernels.cpu import step  # noqa: F401
    except Exception as error:  # a missing package, or one that does not fit NumPy or this CPU
        return f"{type(error).__name__}: {error}"
    return None
