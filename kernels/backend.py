"""Which implementation of the kernels runs: "triton" or "torch"."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Mark a function in which values decide what happens, which torch.compile cannot follow: it leaves it alone."""
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def wants_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # any() would take three times as long
            if tensor is not None and tensor.requires_grad:
                return True
    return False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def backend(device: torch.device) -> str:
    """Return "triton" on a CUDA device on which a Triton kernel really ran, else "torch".

    GPT_KERNELS=torch|triton overrides. On a CPU Triton runs only interpreted (TRITON_INTERPRET=1): slowly, for tests.
    Raises ValueError where GPT_KERNELS holds another name.
    """
    asked = os.environ.get("GPT_KERNELS", "")
    if asked not in ("", "torch", "triton"):
        raise ValueError(f"GPT_KERNELS is {asked!r}; expected torch or triton")
    if asked:
        return asked
    return "triton" if device.type == "cuda" and why_not_triton(device) is None else "torch"


@cache
def why_not_triton(device: torch.device) -> str | None:
    """Return None where a probe kernel ran on the device and gave the right answer, else the reason."""
    try:
        from kernels.jit import probe

        return probe(device)
    except Exception as error:  # a missing package, compiler or driver, each with errors of its own
        return f"{type(error).__name__}: {error}"
