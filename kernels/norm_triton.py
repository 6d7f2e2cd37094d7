"""LayerNorm and RMSNorm in Triton: kernels, their launches, and the operators that torch.compile and autograd know.

With xhat = (x - mean) * rstd and g = dy * weight, both of one row (Ba et al. 2016, arXiv:1607.06450):

    dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd    dw = sum over rows of dy * xhat    db = sum over rows of dy

RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) is the same without the two means, of x and of g: not CENTRED.

Each program of the backward kernel adds up dw and db over its own rows, and a third kernel adds up what the programs
found. There are no atomics: shape and device settle the order of every sum, so that the bits are equal in every run.

Names: b_ is a block in registers, o_ are offsets. Sizes: ROWS rows of WIDTH numbers, in blocks of BLOCK_N columns.
"""

from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.backend import direct
from kernels.jit import Launch, jit, kernel


@kernel
def forward_kernel(
    x_ptr,  # [rows, WIDTH], like all tensors here whose shape is not given
    residual_ptr,  # or None
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH], or None
    y_ptr,
    sum_ptr,  # x + residual, where there is a residual
    stats_ptr,  # fp32 [2, rows]: mean and 1 / standard deviation; [1, rows] where not CENTRED: 1 / root mean square
    rows, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least WIDTH
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_n = tl.arange(0, BLOCK_N)
    column = o_n < WIDTH
    inside = (o_row < rows)[:, None] & column[None, :]
    offsets = o_row[:, None].to(tl.int64) * WIDTH + o_n[None, :]
    b_x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK_N]
    if RESIDUAL:
        b_x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    # Loaded before the first reduction, because no load may be moved across the barriers of a reduction.
    b_weight = tl.load(weight_ptr + o_n, mask=column, other=0.0).to(tl.float32)  # [BLOCK_N]
    if BIAS:
        b_bias = tl.load(bias_ptr + o_n, mask=column, other=0.0).to(tl.float32)
    if RESIDUAL:
        # The backward pass reads the sum as it was stored, so that the statistics must be those of the rounded sum.
        b_sum = b_x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, b_sum, mask=inside)
        b_x = b_sum.to(tl.float32)
    if CENTRED:
        # The row is in registers: the variance is taken from x - mean, not from the difference of two large squares.
        b_mean = tl.sum(b_x, 1) / WIDTH  # [ROWS]
        b_x = tl.where(column[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / WIDTH + eps)
    b_y = b_x * b_rstd[:, None] * b_weight[None, :]
    if BIAS:
        b_y += b_bias[None, :]
    tl.store(y_ptr + offsets, b_y.to(y_ptr.dtype.element_ty), mask=inside)
    if CENTRED:
        tl.store(stats_ptr + o_row, b_mean, mask=o_row < rows)
        stats_ptr += rows
    tl.store(stats_ptr + o_row, b_rstd, mask=o_row < rows)


@jit
def _load_rows(x_ptr, dy_ptr, b_weight, b_mean, b_rstd, o_row, o_n, rows, WIDTH: tl.constexpr):
    """Return xhat, dy and dy * weight of some rows and columns, each fp32 [ROWS, BLOCK_N]."""
    inside = (o_row < rows)[:, None] & (o_n < WIDTH)[None, :]
    offsets = o_row[:, None].to(tl.int64) * WIDTH + o_n[None, :]
    b_x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    b_dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    # Beyond the edges dy is 0, and with it everything that is summed.
    return (b_x - b_mean[:, None]) * b_rstd[:, None], b_dy, b_dy * b_weight[None, :]


@kernel
def backward_kernel(
    dy_ptr,
    d_sum_ptr,  # the gradient of x + residual from elsewhere, which is added to dx; or None
    x_ptr,  # what was normalised
    weight_ptr, stats_ptr, dx_ptr,
    partial_ptr,  # fp32 [programs, 1 or 2, WIDTH]: each program's dw, and db where there is a bias
    rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,  # blocks of columns; each has programs of its own
    STAGES: tl.constexpr, BIAS: tl.constexpr, D_SUM: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = o_n < WIDTH
    b_weight = tl.load(weight_ptr + o_n, mask=column, other=0.0).to(tl.float32)
    b_dw = tl.zeros([ROWS, BLOCK_N], tl.float32)
    b_db = tl.zeros([ROWS, BLOCK_N], tl.float32)
    # A program takes every num_programs-th block of rows and keeps dw and db in registers all the way: what it adds up,
    # and in which order, depends on the shape alone.
    for row in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        o_row = row + tl.arange(0, ROWS)
        b_mean = tl.zeros([ROWS], tl.float32)
        if CENTRED:
            b_mean = tl.load(stats_ptr + o_row, mask=o_row < rows, other=0.0)
        b_rstd = tl.load(stats_ptr + (rows if CENTRED else 0) + o_row, mask=o_row < rows, other=0.0)
        b_first = tl.zeros([ROWS], tl.float32)  # sum of g over the row
        b_second = tl.zeros([ROWS], tl.float32)  # sum of g * xhat over the row
        # The columns that belong to other programs count in these two sums only.
        for other in tl.static_range(1, SPLITS):
            o_other = (tl.program_id(1) + other) % SPLITS * BLOCK_N + tl.arange(0, BLOCK_N)
            b_other = tl.load(weight_ptr + o_other, mask=o_other < WIDTH, other=0.0).to(tl.float32)
            b_xhat, _, b_g = _load_rows(x_ptr, dy_ptr, b_other, b_mean, b_rstd, o_row, o_other, rows, WIDTH)
            if CENTRED:
                b_first += tl.sum(b_g, 1)
            b_second += tl.sum(b_g * b_xhat, 1)
        b_xhat, b_dy, b_g = _load_rows(x_ptr, dy_ptr, b_weight, b_mean, b_rstd, o_row, o_n, rows, WIDTH)
        inside = (o_row < rows)[:, None] & column[None, :]
        offsets = o_row[:, None].to(tl.int64) * WIDTH + o_n[None, :]
        if D_SUM:
            b_d_sum = tl.load(d_sum_ptr + offsets, mask=inside, other=0.0)
        b_dw += b_dy * b_xhat
        if BIAS:
            b_db += b_dy
        if CENTRED:
            b_first = (b_first + tl.sum(b_g, 1)) / WIDTH
        b_second = (b_second + tl.sum(b_g * b_xhat, 1)) / WIDTH
        b_dx = (b_g - b_first[:, None] - b_xhat * b_second[:, None]) * b_rstd[:, None]
        if D_SUM:
            b_dx += b_d_sum.to(tl.float32)
        tl.store(dx_ptr + offsets, b_dx.to(dx_ptr.dtype.element_ty), mask=inside)
    partial_ptr += tl.program_id(0) * (2 * WIDTH if BIAS else WIDTH)
    tl.store(partial_ptr + o_n, tl.sum(b_dw, 0), mask=column)
    if BIAS:
        tl.store(partial_ptr + WIDTH + o_n, tl.sum(b_db, 0), mask=column)


@kernel
def sum_kernel(
    partial_ptr,  # fp32 [programs, columns]
    out_ptr,  # [columns]
    columns, programs, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for program in tl.range(0, programs, BLOCK_P, num_stages=STAGES):
        o_p = program + tl.arange(0, BLOCK_P)
        inside = (o_p < programs)[:, None] & (o_n < columns)[None, :]
        b_sum += tl.load(partial_ptr + o_p[:, None] * columns + o_n[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + o_n, tl.sum(b_sum, 0).to(out_ptr.dtype.element_ty), mask=o_n < columns)


@cache
def forward_options(width: int) -> dict[str, int]:
    """Return the constants of the forward kernel.

    A warp takes up to 1,024 numbers, of one row or of several, and then no sum waits for another warp; a wide row has
    several warps. A thread has four 16-byte loads of bf16 on their way, so that 32 programs, as many as a
    multiprocessor runs, have 64 KiB on their way: three times what keeps the memory busy.
    """
    columns = max(32, triton.next_power_of_2(width))
    warps = 1 if columns <= 1024 else min(16, columns // 512)
    return {"WIDTH": width, "ROWS": max(1, 1024 // columns), "BLOCK_N": columns, "num_warps": warps}


@cache
def backward_options(width: int) -> dict[str, int]:
    """Return the constants of the backward kernel.

    A thread takes 16 numbers: with x, dy, weight, dw and db of each in registers (128 at most), 16 warps fit on a
    multiprocessor. A program that finished a row before it asked for the next would leave the memory idle most of the
    time. Here the waits of several programs overlap, and each fetches its next rows while it works on these (STAGES):
    some 50 KiB are on their way, where 20 would do.
    """
    columns = min(8192, max(32, triton.next_power_of_2(width)))
    splits = triton.cdiv(width, columns)
    return {
        "WIDTH": width, "ROWS": max(1, 2048 // columns), "BLOCK_N": columns, "SPLITS": splits,
        "STAGES": 2 if splits == 1 else 1,  # with two splits, one more stage would not fit into shared memory
        "num_warps": max(4, columns // 512),
        # A product that is fused into the subtraction after it is not the rounded one whose mean is subtracted: where
        # both should cancel, a rounding error would be left, and be multiplied by up to 1 / sqrt(eps).
        "enable_fp_fusion": False,
    }  # fmt: skip


@cache
def sum_options(columns: int) -> dict[str, int]:
    """Return the constants of the sum kernel: blocks so narrow that even 256 columns keep 16 multiprocessors busy."""
    block = max(16, triton.next_power_of_2(columns) // 128)
    return {"BLOCK_P": 4096 // block, "BLOCK_N": block, "STAGES": 4, "num_warps": 8}


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y like x; x + residual, empty without one; the statistics, fp32 [2, rows], or [1, rows] of RMSNorm."""
    x, weight = x.contiguous(), weight.contiguous()
    residual, bias = (None if each is None else each.contiguous() for each in (residual, bias))
    y, summed, stats = _empty_results(x, residual, centred)
    switches = {"BIAS": bias is not None, "RESIDUAL": residual is not None, "CENTRED": len(stats) == 2}
    rows, launch = stats.shape[1], forward_launch(x.shape[-1], **switches)
    if rows:
        programs = -(-rows // launch.constants["ROWS"])
        launch((programs, 1, 1), (x, residual, weight, bias, y, summed, stats), (), (rows, float(eps)))
    return y, summed, stats


@cache
def forward_launch(width: int, **switches: bool) -> Launch:
    return Launch(forward_kernel, **forward_options(width), **switches)


def _empty_results(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    summed = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    centred = rest[-1]
    stats = torch.empty(1 + centred, x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), summed, stats


def backward(
    d_y: Tensor, d_sum: Tensor | None, x: Tensor, weight: Tensor, stats: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """Return dx, which is the gradient of the residual too, and the gradients of weight and bias, [1 or 2, width]."""
    d_y, x, weight = d_y.contiguous(), x.contiguous(), weight.contiguous()
    d_sum = None if d_sum is None else d_sum.contiguous()
    rows, width = stats.shape[1], x.shape[-1]
    launch, total = backward_launches(width, BIAS=bias, D_SUM=d_sum is not None, CENTRED=len(stats) == 2)
    options = launch.constants
    # As many programs as run at a time, 16 warps to a multiprocessor. More programs would leave more sums to be added
    # up: these are 4% of the bytes that the pass moves at 16k rows.
    programs = min(-(-rows // options["ROWS"]), 16 // options["num_warps"] * tiles.multiprocessors(x.device))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, 2 if bias else 1, width, dtype=torch.float32, device=x.device)
    d_parameters = torch.empty(partial.shape[1:], dtype=weight.dtype, device=x.device)
    if rows:
        launch((programs, options["SPLITS"], 1), (d_y, d_sum, x, weight, stats, dx, partial), (), (rows,))
    columns = d_parameters.numel()
    total((-(-columns // total.constants["BLOCK_N"]), 1, 1), (partial, d_parameters), (columns,), (programs,))
    return dx, d_parameters


@cache
def backward_launches(width: int, **switches: bool) -> tuple[Launch, Launch]:
    columns = 2 * width if switches["BIAS"] else width
    return Launch(backward_kernel, **backward_options(width), **switches), Launch(sum_kernel, **sum_options(columns))


norm_forward = torch.library.custom_op("gpt::norm_forward", forward, mutates_args=())
norm_forward.register_fake(_empty_results)
norm_backward = torch.library.custom_op("gpt::norm_backward", backward, mutates_args=())


@norm_backward.register_fake
def _(d_y: Tensor, d_sum: Tensor | None, x: Tensor, weight: Tensor, stats: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.new_empty(2 if bias else 1, x.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, *_ = inputs
    _, summed, stats = output
    ctx.save_for_backward(x if residual is None else summed, weight, stats)
    ctx.residual, ctx.bias = residual is not None, bias is not None
    ctx.mark_non_differentiable(stats)
    # Nobody uses the sum of a model's last norm: no zeros are made, and read, for its gradient.
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, d_y: Tensor | None, d_sum: Tensor | None, _: None, run: Any = norm_backward
) -> tuple[Tensor | None, ...]:
    x, weight, stats = ctx.saved_tensors
    d_y = torch.zeros_like(x) if d_y is None else d_y
    dx, d_parameters = run(d_y, d_sum if ctx.residual else None, x, weight, stats, ctx.bias)
    return dx, dx if ctx.residual else None, d_parameters[0], d_parameters[1] if ctx.bias else None, None, None


norm_forward.register_autograd(_gradient, setup_context=_save)
run_norm = direct(norm_forward, forward, _save, partial(_gradient, run=backward), leaves=4)
