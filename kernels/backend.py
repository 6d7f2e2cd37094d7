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


def direct(operator: Any, function: Any, save: Any, gradient: Any, leaves: int | None = None) -> Any:
    """Return a function that does what an operator does, without PyTorch's dispatcher.

    Through it an operator takes several times as long to reach the GPU as its launches do, a time that torch.compile
    takes out: that is given the operator. `save` and `gradient` are what the operator's register_autograd takes; of the
    arguments only the first so many `leaves` may want a gradient.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *upstream: Tensor | None) -> Any:
            return gradient(ctx, *upstream)

    def run(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*inputs)
        return apply(*inputs) if wants_gradient(*inputs[:leaves]) else function(*inputs)

    apply: Any = Direct.apply
    return run


def save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the same function, which keeps nothing but its tensors for the gradient: there, it runs again."""

    def gradient(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        with torch.enable_grad():
            result = function(*leaves)
        return torch.autograd.grad(result, leaves, upstream)

    run: Callable[..., Tensor] = direct(function, function, save_inputs, gradient)
    return run


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
