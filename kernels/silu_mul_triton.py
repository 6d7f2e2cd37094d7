"""silu_mul in Triton: one kernel for both directions, its launch, and operators for torch.compile and autograd.

With s = sigmoid(gate), of one number (Shazeer 2020, arXiv:2002.05202):

    y = gate * s * up    d_gate = dy * up * s * (1 + gate * (1 - s))    d_up = dy * gate * s
"""

from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import direct, save_inputs
from kernels.jit import Launch, kernel


@kernel
def silu_mul_kernel(
    x_ptr,  # [rows, 2 * WIDTH]: gate, then up
    dy_ptr,  # [rows, WIDTH]; or None, and the result is y
    out_ptr,  # y [rows, WIDTH], or dx like x
    rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    o_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (o_row < rows) & (o_n < WIDTH)
    o_x, o_y = o_row * (2 * WIDTH) + o_n, o_row * WIDTH + o_n
    b_gate = tl.load(x_ptr + o_x, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK_N], like all blocks here
    b_up = tl.load(x_ptr + o_x + WIDTH, mask=inside, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    if BACKWARD:
        b_dy = tl.load(dy_ptr + o_y, mask=inside, other=0.0).to(tl.float32)
        b_d_gate = b_dy * b_up * b_sigmoid * (1 + b_gate * (1 - b_sigmoid))
        tl.store(out_ptr + o_x, b_d_gate.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + o_x + WIDTH, (b_dy * b_gate * b_sigmoid).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + o_y, (b_gate * b_sigmoid * b_up).to(out_ptr.dtype.element_ty), mask=inside)


@cache
def options(width: int) -> dict[str, int]:
    """Return the constants: a thread takes 8 numbers, 16 bytes of bf16 from each tensor, of one row or of several.

    Blocks of 512 fit the hidden widths of most models without a rest: 1,536, 2,560, 5,632, 8,192.
    """
    columns = min(512, triton.next_power_of_2(width))
    return {"WIDTH": width, "ROWS": 1024 // columns, "BLOCK_N": columns, "num_warps": 4}


@cache
def make_launch(width: int, backward: bool) -> Launch:
    return Launch(silu_mul_kernel, **options(width), BACKWARD=backward)


def forward(x: Tensor) -> Tensor:
    """Return y [..., M] for x [..., 2 M]."""
    return _run(x, None, _empty_y(x))


def backward(d_y: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x [..., 2 M]."""
    return _run(x, d_y.contiguous(), _empty_dx(d_y, x))


def _run(x: Tensor, d_y: Tensor | None, out: Tensor) -> Tensor:
    x, width = x.contiguous(), x.shape[-1] // 2
    if x.numel():
        launch, rows = make_launch(width, d_y is not None), x.numel() // (2 * width)
        blocks = (triton.cdiv(rows, launch.constants["ROWS"]), triton.cdiv(width, launch.constants["BLOCK_N"]), 1)
        launch(blocks, (x, d_y, out), (), (rows,))
    return out


def _empty_y(x: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)


def _empty_dx(d_y: Tensor, x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


silu_mul_forward = torch.library.custom_op("gpt::silu_mul_forward", forward, mutates_args=())
silu_mul_forward.register_fake(_empty_y)
silu_mul_backward = torch.library.custom_op("gpt::silu_mul_backward", backward, mutates_args=())
silu_mul_backward.register_fake(_empty_dx)


def _gradient(ctx: Any, d_y: Tensor, run: Any = silu_mul_backward) -> tuple[Tensor]:
    return (run(d_y, *ctx.saved_tensors),)


silu_mul_forward.register_autograd(_gradient, setup_context=save_inputs)
run_silu_mul = direct(silu_mul_forward, forward, save_inputs, partial(_gradient, run=backward))
