"""The plainest causal FlashAttention-2 in Triton, as a peer on paper: what the tutorials' algorithm compiles to.

q, k, v and their gradients are [batch * heads, length, HEAD_DIM], dense, and the length is a multiple of every block.
stats is fp32 [2, batch * heads, length]: log-sum-exp in units of log2, and delta. `scale` holds log2(e).
"""

import triton.language as tl

from kernels.jit import jit

LN2 = tl.constexpr(0.6931471805599453)


@jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row, start = tl.program_id(0) * BLOCK_T, tl.program_id(1).to(tl.int64) * length
    k = tl.make_tensor_descriptor(k_ptr + start * HEAD_DIM, [length, HEAD_DIM], [HEAD_DIM, 1], [BLOCK_S, HEAD_DIM])
    v = tl.make_tensor_descriptor(v_ptr + start * HEAD_DIM, [length, HEAD_DIM], [HEAD_DIM, 1], [BLOCK_S, HEAD_DIM])
    o_row = row + tl.arange(0, BLOCK_T)
    b_q = tl.load(_tile(q_ptr, start + row, BLOCK_T, HEAD_DIM))
    b_out = tl.zeros([BLOCK_T, HEAD_DIM], tl.float32)
    b_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    for masked in tl.static_range(2):
        for key in tl.range(row if masked else 0, row + BLOCK_T if masked else row, BLOCK_S):
            b_s = tl.dot(b_q, k.load([key, 0]).T)
            if masked:
                b_s = tl.where(o_row[:, None] >= key + tl.arange(0, BLOCK_S)[None, :], b_s, -1e6)
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
            b_p = tl.exp2(b_s * scale - b_new[:, None])
            b_rescale = tl.exp2(b_max - b_new)
            b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
            b_out = tl.dot(b_p.to(b_q.dtype), v.load([key, 0]), b_out * b_rescale[:, None])
            b_max = b_new
    tl.store(_tile(out_ptr, start + row, BLOCK_T, HEAD_DIM), (b_out / b_sum[:, None]).to(b_q.dtype))
    tl.store(lse_ptr + start + o_row, b_max + tl.log2(b_sum))


@jit
def _tile(base_ptr, row, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    return base_ptr + (row + tl.arange(0, BLOCK)[:, None]) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]


@jit
def dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dk_ptr, dv_ptr, stats_ptr, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    key, start = tl.program_id(0) * BLOCK_S, tl.program_id(1).to(tl.int64) * length
    lse_ptr = stats_ptr + start
    delta_ptr = lse_ptr + tl.num_programs(1) * length
    b_k = tl.load(_tile(k_ptr, start + key, BLOCK_S, HEAD_DIM))
    b_v = tl.load(_tile(v_ptr, start + key, BLOCK_S, HEAD_DIM))
    b_dk = tl.zeros([BLOCK_S, HEAD_DIM], tl.float32)
    b_dv = tl.zeros([BLOCK_S, HEAD_DIM], tl.float32)
    for masked in tl.static_range(1, -1, -1):
        for row in tl.range(key if masked else key + BLOCK_S, key + BLOCK_S if masked else length, BLOCK_T):
            o_row = row + tl.arange(0, BLOCK_T)
            b_q = tl.load(_tile(q_ptr, start + row, BLOCK_T, HEAD_DIM))
            b_d_out = tl.load(_tile(d_out_ptr, start + row, BLOCK_T, HEAD_DIM))
            b_p = tl.exp2(tl.dot(b_k, b_q.T) * scale - tl.load(lse_ptr + o_row)[None, :])
            if masked:
                b_p = tl.where(o_row[None, :] >= key + tl.arange(0, BLOCK_S)[:, None], b_p, 0.0)
            b_dv = tl.dot(b_p.to(b_q.dtype), b_d_out, b_dv)
            b_ds = b_p * (tl.dot(b_v, b_d_out.T) - tl.load(delta_ptr + o_row)[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk)
    tl.store(_tile(dk_ptr, start + key, BLOCK_S, HEAD_DIM), (b_dk * scale * LN2).to(b_k.dtype))
    tl.store(_tile(dv_ptr, start + key, BLOCK_S, HEAD_DIM), b_dv.to(b_k.dtype))


@jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dq_ptr, stats_ptr, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row, start = tl.program_id(0) * BLOCK_T, tl.program_id(1).to(tl.int64) * length
    o_row = row + tl.arange(0, BLOCK_T)
    b_q = tl.load(_tile(q_ptr, start + row, BLOCK_T, HEAD_DIM))
    b_d_out = tl.load(_tile(d_out_ptr, start + row, BLOCK_T, HEAD_DIM))
    b_lse = tl.load(stats_ptr + start + o_row)
    b_delta = tl.load(stats_ptr + start + tl.num_programs(1) * length + o_row)
    b_dq = tl.zeros([BLOCK_T, HEAD_DIM], tl.float32)
    for masked in tl.static_range(2):
        for key in tl.range(row if masked else 0, row + BLOCK_T if masked else row, BLOCK_S):
            b_k = tl.load(_tile(k_ptr, start + key, BLOCK_S, HEAD_DIM))
            b_v = tl.load(_tile(v_ptr, start + key, BLOCK_S, HEAD_DIM))
            b_p = tl.exp2(tl.dot(b_q, b_k.T) * scale - b_lse[:, None])
            if masked:
                b_p = tl.where(o_row[:, None] >= key + tl.arange(0, BLOCK_S)[None, :], b_p, 0.0)
            b_ds = b_p * (tl.dot(b_d_out, b_v.T) - b_delta[:, None])
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq)
    tl.store(_tile(dq_ptr, start + row, BLOCK_T, HEAD_DIM), (b_dq * scale * LN2).to(b_q.dtype))
