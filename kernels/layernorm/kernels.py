"""The LayerNorm kernels: forward; backward, which leaves sums of dw and db per program; and the sum of those sums.

With xhat = (x - mean) * rstd and g = dy * weight, both of one row (Ba et al. 2016, arXiv:1607.06450):

    dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd    dw = sum over rows of dy * xhat    db = sum over rows of dy

No atomics: every sum is taken in an order that the shape and the device settle, and so bit-equal from run to run.

Names: b_ a block in registers, o_ offsets. Sizes: ROWS rows of WIDTH numbers, in blocks of BLOCK_N columns.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr,  # [rows, WIDTH], as are all tensors here that are not of other shape
    residual_ptr,  # or nothing
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH], or nothing
    y_ptr,
    sum_ptr,  # x + residual, where there is a residual
    stats_ptr,  # fp32 [2, rows]: mean and 1 / standard deviation
    rows,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least WIDTH
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_n = tl.arange(0, BLOCK_N)
    column = o_n < WIDTH
    inside = (o_row < rows)[:, None] & column[None, :]
    offsets = o_row[:, None].to(tl.int64) * WIDTH + o_n[None, :]
    b_x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK_N]
    if RESIDUAL:
        b_x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    # Asked for before the first reduction, whose barriers no load may be moved across.
    b_weight = tl.load(weight_ptr + o_n, mask=column, other=0.0).to(tl.float32)
    if BIAS:
        b_bias = tl.load(bias_ptr + o_n, mask=column, other=0.0).to(tl.float32)
    if RESIDUAL:
        # The backward pass knows the sum as it was stored: the statistics must be those of the rounded one.
        b_sum = b_x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, b_sum, mask=inside)
        b_x = b_sum.to(tl.float32)
    b_mean = tl.sum(b_x, 1) / WIDTH
    b_x = tl.where(column[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / WIDTH + eps)
    b_y = b_x * b_rstd[:, None] * b_weight[None, :]
    if BIAS:
        b_y += b_bias[None, :]
    tl.store(y_ptr + offsets, b_y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(stats_ptr + o_row, b_mean, mask=o_row < rows)
    tl.store(stats_ptr + rows + o_row, b_rstd, mask=o_row < rows)


@triton.jit
def _load_rows(x_ptr, dy_ptr, b_weight, b_mean, b_rstd, o_row, o_n, rows, WIDTH: tl.constexpr):
    """xhat, dy and dy * weight of some rows and columns, fp32."""
    inside = (o_row < rows)[:, None] & (o_n < WIDTH)[None, :]
    offsets = o_row[:, None].to(tl.int64) * WIDTH + o_n[None, :]
    b_x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    b_dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    # Beyond the edges dy is 0, and with it all that is summed.
    return (b_x - b_mean[:, None]) * b_rstd[:, None], b_dy, b_dy * b_weight[None, :]


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dy_ptr,
    d_sum_ptr,  # gradient of x + residual from elsewhere, added to dx; or nothing
    x_ptr,  # what was normalised
    weight_ptr,
    stats_ptr,
    dx_ptr,
    partial_ptr,  # fp32 [programs, 1 or 2, WIDTH]: each program's dw, and db where there is a bias
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,  # blocks of columns; each has programs of its own
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    D_SUM: tl.constexpr,
):
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = o_n < WIDTH
    b_weight = tl.load(weight_ptr + o_n, mask=column, other=0.0).to(tl.float32)
    b_dw = tl.zeros([ROWS, BLOCK_N], tl.float32)
    b_db = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for row in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        o_row = row + tl.arange(0, ROWS)
        b_mean = tl.load(stats_ptr + o_row, mask=o_row < rows, other=0.0)
        b_rstd = tl.load(stats_ptr + rows + o_row, mask=o_row < rows, other=0.0)
        b_first = tl.zeros([ROWS], tl.float32)
        b_second = tl.zeros([ROWS], tl.float32)
        # Of the columns of the other programs only the two sums of the row are needed.
        for other in tl.static_range(1, SPLITS):
            o_other = (tl.program_id(1) + other) % SPLITS * BLOCK_N + tl.arange(0, BLOCK_N)
            b_other = tl.load(weight_ptr + o_other, mask=o_other < WIDTH, other=0.0).to(tl.float32)
            b_xhat, _, b_g = _load_rows(x_ptr, dy_ptr, b_other, b_mean, b_rstd, o_row, o_other, rows, WIDTH)
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


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(
    partial_ptr,  # fp32 [programs, columns]
    out_ptr,  # [columns]
    programs,
    columns,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for program in tl.range(0, programs, BLOCK_P, num_stages=STAGES):
        o_p = program + tl.arange(0, BLOCK_P)
        inside = (o_p < programs)[:, None] & (o_n < columns)[None, :]
        b_sum += tl.load(partial_ptr + o_p[:, None] * columns + o_n[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + o_n, tl.sum(b_sum, 0).to(out_ptr.dtype.element_ty), mask=o_n < columns)
