"""Which implementation of the kernels runs: "triton" or "torch"."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return function(*tensors), of which nothing but the tensors is kept for the gradient: it runs again there."""
    # torch.compile decides for itself what to keep.
    if torch.compiler.is_compiling() or not wants_gradient(*tensors):
        return function(*tensors)
    apply: Any = _Recomputed.apply
    result: Tensor = apply(function, *tensors)
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        leaves = [each.detach().requires_grad_(want) for each, want in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            result = ctx.function(*leaves)
        found = iter(torch.autograd.grad(result, [each for each in leaves if each.requires_grad], gradient))
        return None, *(next(found) if want else None for want in wanted)


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
