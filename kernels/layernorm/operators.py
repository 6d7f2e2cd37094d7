"""From tensors to LayerNorm's kernels: sizes, launches, and the operator that torch.compile and autograd know."""

from functools import cache
from typing import Any, Optional

import torch
import triton
from torch import Tensor

from kernels.layernorm.kernels import backward_kernel, forward_kernel, sum_kernel


@cache
def forward_options(width: int) -> dict[str, int]:
    """Up to 1,024 numbers, of one row or several, for one warp, whose sums wait for no other; wide rows for several.

    A thread of such a warp has four 16-byte loads of bf16 on their way, and 32 such programs, a multiprocessor's worth,
    64 KiB: three times what keeps the memory busy.
    """
    columns = max(32, triton.next_power_of_2(width))
    warps = 1 if columns <= 1024 else min(16, columns // 512)
    return {"WIDTH": width, "ROWS": max(1, 1024 // columns), "BLOCK_N": columns, "num_warps": warps}


@cache
def backward_options(width: int) -> dict[str, int]:
    """16 numbers a thread: with x, dy, weight, dw and db of each in registers (128 at most), 16 warps fit.

    A program that loads one row, reduces it and stores it before it asks for the next leaves the memory idle most of
    the time. Here several programs share a multiprocessor, so that their waits overlap, and each fetches its next rows
    while it works on these (STAGES): some 50 KiB on their way, where 20 would do.
    """
    columns = min(8192, max(32, triton.next_power_of_2(width)))
    splits = triton.cdiv(width, columns)
    return {
        "WIDTH": width,
        "ROWS": max(1, 2048 // columns),
        "BLOCK_N": columns,
        "SPLITS": splits,
        "STAGES": 2 if splits == 1 else 1,  # of two splits, one more stage would not fit into shared memory
        "num_warps": max(4, columns // 512),
    }


@cache
def sum_options(columns: int) -> dict[str, int]:
    """Blocks so narrow that even 256 columns keep 16 multiprocessors busy; all a program reads is under way at once."""
    block = max(16, triton.next_power_of_2(columns) // 128)
    return {"BLOCK_P": 4096 // block, "BLOCK_N": block, "STAGES": 4, "num_warps": 8}


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y like x; x + residual, empty without one; mean and 1 / standard deviation, fp32 [2, rows])."""
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    y, summed, stats = _results(x, residual)
    rows, width = stats.shape[1], x.shape[-1]
    options = forward_options(width)
    if rows:
        forward_kernel[(triton.cdiv(rows, options["ROWS"]),)](
            x, residual, weight, bias, y, summed, stats, rows, eps,
            BIAS=bias is not None, RESIDUAL=residual is not None, **options,
        )  # fmt: skip
    return y, summed, stats


def _results(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    summed = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty(2, x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), summed, stats


def backward(
    d_y: Tensor, d_sum: Tensor | None, x: Tensor, weight: Tensor, stats: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """(dx, which is the gradient of the residual too; gradients of weight and, where there is one, of bias)."""
    d_y, x, weight = d_y.contiguous(), x.contiguous(), weight.contiguous()
    d_sum = None if d_sum is None else d_sum.contiguous()
    rows, width = stats.shape[1], x.shape[-1]
    options = backward_options(width)
    # As many as run at a time, 16 warps to a multiprocessor. More would leave more sums to be added up: these are 4% of
    # what the pass moves at 16k rows.
    programs = min(triton.cdiv(rows, options["ROWS"]), 16 // options["num_warps"] * multiprocessors(x.device))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, 2 if bias else 1, width, dtype=torch.float32, device=x.device)
    d_parameters = torch.empty(partial.shape[1:], dtype=weight.dtype, device=x.device)
    if rows:
        backward_kernel[(programs, options["SPLITS"])](
            d_y, d_sum, x, weight, stats, dx, partial, rows, BIAS=bias, D_SUM=d_sum is not None, **options
        )
    columns = d_parameters.numel()
    options = sum_options(columns)
    sum_kernel[(triton.cdiv(columns, options["BLOCK_N"]),)](partial, d_parameters, programs, columns, **options)
    return dx, d_parameters


@torch.library.custom_op("gpt::layer_norm_forward", mutates_args=())
def layer_norm_forward(
    x: Tensor,
    residual: Optional[Tensor],  # noqa: UP045 - the schema is read from these annotations, by every version of torch
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return forward(x, residual, weight, bias, eps)


@layer_norm_forward.register_fake
def _(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _results(x, residual)


@torch.library.custom_op("gpt::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    d_y: Tensor,
    d_sum: Optional[Tensor],  # noqa: UP045
    x: Tensor,
    weight: Tensor,
    stats: Tensor,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    return backward(d_y, d_sum, x, weight, stats, bias)


@layer_norm_backward.register_fake
def _(d_y: Tensor, d_sum: Tensor | None, x: Tensor, weight: Tensor, stats: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.new_empty(2 if bias else 1, x.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, _ = inputs
    _, summed, stats = output
    ctx.save_for_backward(x if residual is None else summed, weight, stats)
    ctx.residual, ctx.bias = residual is not None, bias is not None
    # The sum of the last norm of a model goes nowhere: no zeros are made, and read, for its gradient.
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, d_y: Tensor | None, d_sum: Tensor | None, _: None, run: Any = layer_norm_backward
) -> tuple[Tensor | None, ...]:
    x, weight, stats = ctx.saved_tensors
    d_y = torch.zeros_like(x) if d_y is None else d_y
    dx, d_parameters = run(d_y, d_sum if ctx.residual else None, x, weight, stats, ctx.bias)
    return dx, dx if ctx.residual else None, d_parameters[0], d_parameters[1] if ctx.bias else None, None


layer_norm_forward.register_autograd(_gradient, setup_context=_save)


class LayerNorm(torch.autograd.Function):
    """layer_norm_forward and its gradient, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = forward(*inputs)
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])
        return output

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_sum: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, d_y, d_sum, None, run=backward)
