"""Flash attention, backward: the delta kernel, the dk and dv kernel, the dq kernel, and their launches.

With P = exp(S - lse) computed again from the saved log-sum-exp, and dP = dO V^T (Dao, arXiv:2307.08691):

    delta = rowsum(dO * O) - dlse    dV = P^T dO    dS = P * (dP - delta)    dQ = scale * dS K    dK = scale * dS^T Q

A program of dk_dv_kernel owns a block of keys and walks over the queries that see it; a program of dq_kernel owns a
block of queries and walks over the keys it sees. Scores are computed twice, but every gradient has a single owner, who
adds it up in registers and writes it once: there are no atomics, and the bits are equal in every run.

Names: b_ is a block in registers, o_ are offsets. Sizes: T queries, S keys, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.attention import tile
from kernels.attention.reference import Call
from kernels.jit import jit, kernel, tanh


@kernel
def delta_kernel(
    out_ptr, d_out_ptr,
    d_lse_ptr, delta_ptr, cu_q_ptr,  # the first two fp32, like lse
    stride_out_batch, stride_out_token, stride_out_head,
    stride_d_out_batch, stride_d_out_token, stride_d_out_head, stride_lse_batch, stride_lse_head,
    queries, heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # Through the softmax a score's gradient depends on its whole row: dS = P * (dP - rowsum(P * dP)). That row sum
    # equals rowsum(dO * O), because O = P V: it needs no scores, and is computed here once for all blocks. The
    # log-sum-exp's own gradient adds P * dlse to dS, and so becomes part of the same number.
    row, batch, head = tile.program(queries, heads, BLOCK_T, False)
    out_start, length = tile.sequence(cu_q_ptr, batch, queries, stride_out_batch, stride_out_token, PACKED)
    d_out_start, _ = tile.sequence(cu_q_ptr, batch, queries, stride_d_out_batch, stride_d_out_token, PACKED)
    lse_start, _ = tile.sequence(cu_q_ptr, batch, queries, stride_lse_batch, 1, PACKED)
    if row >= length:
        return
    out_ptr += out_start + head.to(tl.int64) * stride_out_head
    d_out_ptr += d_out_start + head.to(tl.int64) * stride_d_out_head
    lse_start += head.to(tl.int64) * stride_lse_head
    b_out = tile.load(out_ptr, row, length, stride_out_token, BLOCK_T, BLOCK_D, HEAD_DIM, False).to(tl.float32)
    b_d_out = tile.load(d_out_ptr, row, length, stride_d_out_token, BLOCK_T, BLOCK_D, HEAD_DIM, False).to(tl.float32)
    o_row = row + tl.arange(0, BLOCK_T)
    inside = o_row < length
    b_d_lse = tl.load(d_lse_ptr + lse_start + o_row, mask=inside, other=0.0)
    tl.store(delta_ptr + lse_start + o_row, tl.sum(b_out * b_d_out, 1) - b_d_lse, mask=inside)


@jit
def _score_gradient(
    b_s, b_dp,  # q k^T and dO V^T, [BLOCK_T, BLOCK_S] or transposed
    b_lse, b_delta,  # one for each query, broadcast over keys; the log-sum-exp in units of log2
    scale, softcap_log2, SOFTCAP: tl.constexpr,  # as in the forward kernel
):  # fmt: skip
    """Return the probabilities and the gradient of the scores before the scale, both without a mask."""
    if SOFTCAP:
        b_tanh = tanh(b_s * scale)
        b_p = tl.exp2(b_tanh * softcap_log2 - b_lse)
        return b_p, b_p * (b_dp - b_delta) * (1.0 - b_tanh * b_tanh)
    b_p = tl.exp2(b_s * scale - b_lse)
    return b_p, b_p * (b_dp - b_delta)


@kernel
def dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr,
    stride_q_batch, stride_q_token, stride_q_head, stride_k_batch, stride_k_token, stride_k_head,
    stride_v_batch, stride_v_token, stride_v_head, stride_d_out_batch, stride_d_out_token, stride_d_out_head,
    stride_dk_batch, stride_dk_token, stride_dk_head, stride_dv_batch, stride_dv_token, stride_dv_head,
    stride_lse_batch, stride_lse_head,
    queries, keys, key_heads, group,
    gradient_scale,  # of the scores, as it was asked for
    scale, softcap_log2, window,  # as in the forward kernel
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
    SPLIT: tl.constexpr,  # see tiles.Tile
):  # fmt: skip
    # The first keys of a causal sequence are seen by the most queries: their programs start first.
    key, batch, key_head = tile.program(keys, key_heads, BLOCK_S, False)
    q_start, queries = tile.sequence(cu_q_ptr, batch, queries, stride_q_batch, stride_q_token, PACKED)
    d_out_start, _ = tile.sequence(cu_q_ptr, batch, queries, stride_d_out_batch, stride_d_out_token, PACKED)
    lse_start, _ = tile.sequence(cu_q_ptr, batch, queries, stride_lse_batch, 1, PACKED)
    k_start, keys = tile.sequence(cu_k_ptr, batch, keys, stride_k_batch, stride_k_token, PACKED)
    v_start, _ = tile.sequence(cu_k_ptr, batch, keys, stride_v_batch, stride_v_token, PACKED)
    dk_start, _ = tile.sequence(cu_k_ptr, batch, keys, stride_dk_batch, stride_dk_token, PACKED)
    dv_start, _ = tile.sequence(cu_k_ptr, batch, keys, stride_dv_batch, stride_dv_token, PACKED)
    if key >= keys:
        return
    k_ptr += k_start + key_head.to(tl.int64) * stride_k_head
    v_ptr += v_start + key_head.to(tl.int64) * stride_v_head
    k = tile.matrix(k_ptr, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    v = tile.matrix(v_ptr, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    b_k = tile.load(k, key, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    b_v = tile.load(v, key, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    b_dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    o_key = key + tl.arange(0, BLOCK_S)
    begin, full_begin, full_end, end = tile.queries_seeing(key, queries, keys, window, BLOCK_T, BLOCK_S, CAUSAL, WINDOW)
    ONE_LOOP: tl.constexpr = (CAUSAL or WINDOW) and not SPLIT
    if ONE_LOOP:  # part 0, with a mask, reaches to the end
        full_begin = end
    # One program takes all query heads that share these keys, one after the other: the sum over the heads stays in its
    # registers, and always has the same order.
    for member in range(group):
        head = (key_head * group + member).to(tl.int64)
        head_q_ptr = q_ptr + q_start + head * stride_q_head
        head_d_out_ptr = d_out_ptr + d_out_start + head * stride_d_out_head
        head_lse_ptr = lse_ptr + lse_start + head * stride_lse_head
        head_delta_ptr = delta_ptr + lse_start + head * stride_lse_head
        q = tile.matrix(head_q_ptr, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
        d_out = tile.matrix(head_d_out_ptr, queries, stride_d_out_token, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
        # As in the forward kernel, part 1 needs no mask. Where CAUSAL, masked rows come first, and none behind part 1.
        for part in tl.static_range(0 if CAUSAL or WINDOW else 1, 1 if ONE_LOOP else 3 if WINDOW else 2):
            first, last = tile.walk(part, begin, full_begin, full_end, end)
            for row in tl.range(first, last, BLOCK_T):
                o_row = row + tl.arange(0, BLOCK_T)
                b_q = tile.load(q, row, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
                b_d_out = tile.load(d_out, row, queries, stride_d_out_token, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
                # A row that does not exist gets probability exp2(-inf) = 0; gradients of other keys are not stored.
                b_lse = tl.load(head_lse_ptr + o_row, mask=o_row < queries, other=float("inf")) * 1.4426950408889634
                b_delta = tl.load(head_delta_ptr + o_row, mask=o_row < queries, other=0.0)
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_S, BLOCK_T]
                b_dp = tl.dot(b_v, tl.trans(b_d_out), input_precision="ieee")  # [BLOCK_S, BLOCK_T]
                b_p, b_ds = _score_gradient(b_s, b_dp, b_lse[None, :], b_delta[None, :], scale, softcap_log2, SOFTCAP)
                if part != 1:
                    mask = tile.visible(o_row[None, :] + keys - queries, o_key[:, None], keys, window, CAUSAL, WINDOW)
                    b_p = tl.where(mask, b_p, 0.0)
                    b_ds = tl.where(mask, b_ds, 0.0)
                b_dv = tl.dot(b_p.to(b_d_out.dtype), b_d_out, b_dv, input_precision="ieee")
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    dk_ptr += dk_start + key_head.to(tl.int64) * stride_dk_head
    dv_ptr += dv_start + key_head.to(tl.int64) * stride_dv_head
    tile.store(dk_ptr, b_dk * gradient_scale, key, keys, stride_dk_token, BLOCK_S, BLOCK_D, HEAD_DIM)
    tile.store(dv_ptr, b_dv, key, keys, stride_dv_token, BLOCK_S, BLOCK_D, HEAD_DIM)


@kernel
def dq_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dq_ptr, lse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr,
    stride_q_batch, stride_q_token, stride_q_head, stride_k_batch, stride_k_token, stride_k_head,
    stride_v_batch, stride_v_token, stride_v_head, stride_d_out_batch, stride_d_out_token, stride_d_out_head,
    stride_dq_batch, stride_dq_token, stride_dq_head, stride_lse_batch, stride_lse_head,
    queries, keys, heads, group, gradient_scale, scale, softcap_log2, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    row, batch, head = tile.program(queries, heads, BLOCK_T, True)  # True: the last rows first
    q_start, queries = tile.sequence(cu_q_ptr, batch, queries, stride_q_batch, stride_q_token, PACKED)
    d_out_start, _ = tile.sequence(cu_q_ptr, batch, queries, stride_d_out_batch, stride_d_out_token, PACKED)
    dq_start, _ = tile.sequence(cu_q_ptr, batch, queries, stride_dq_batch, stride_dq_token, PACKED)
    lse_start, _ = tile.sequence(cu_q_ptr, batch, queries, stride_lse_batch, 1, PACKED)
    k_start, keys = tile.sequence(cu_k_ptr, batch, keys, stride_k_batch, stride_k_token, PACKED)
    v_start, _ = tile.sequence(cu_k_ptr, batch, keys, stride_v_batch, stride_v_token, PACKED)
    if row >= queries:
        return
    q_ptr += q_start + head.to(tl.int64) * stride_q_head
    d_out_ptr += d_out_start + head.to(tl.int64) * stride_d_out_head
    dq_ptr += dq_start + head.to(tl.int64) * stride_dq_head
    k_ptr += k_start + (head // group).to(tl.int64) * stride_k_head
    v_ptr += v_start + (head // group).to(tl.int64) * stride_v_head
    lse_start += head.to(tl.int64) * stride_lse_head
    k = tile.matrix(k_ptr, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    v = tile.matrix(v_ptr, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    o_row = row + tl.arange(0, BLOCK_T)
    o_query = o_row + keys - queries
    b_q = tile.load(q_ptr, row, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM, False)
    b_d_out = tile.load(d_out_ptr, row, queries, stride_d_out_token, BLOCK_T, BLOCK_D, HEAD_DIM, False)
    b_lse = tl.load(lse_ptr + lse_start + o_row, mask=o_row < queries, other=float("inf")) * 1.4426950408889634
    b_delta = tl.load(delta_ptr + lse_start + o_row, mask=o_row < queries, other=0.0)
    b_dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    begin, full_begin, full_end, end = tile.keys_seen(row, queries, keys, window, BLOCK_T, BLOCK_S, CAUSAL, WINDOW)
    # As in the forward kernel, part 1 needs no mask.
    for part in tl.static_range(0 if WINDOW else 1, 3):
        first, last = tile.walk(part, begin, full_begin, full_end, end)
        for key in tl.range(first, last, BLOCK_S):
            b_k = tile.load(k, key, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR, part != 1)
            b_v = tile.load(v, key, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR, part != 1)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
            b_dp = tl.dot(b_d_out, tl.trans(b_v), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
            _b_p, b_ds = _score_gradient(b_s, b_dp, b_lse[:, None], b_delta[:, None], scale, softcap_log2, SOFTCAP)
            if part != 1:
                o_key = key + tl.arange(0, BLOCK_S)
                b_ds = tl.where(tile.visible(o_query[:, None], o_key[None, :], keys, window, CAUSAL, WINDOW), b_ds, 0.0)
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    tile.store(dq_ptr, b_dq * gradient_scale, row, queries, stride_dq_token, BLOCK_T, BLOCK_D, HEAD_DIM)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, contiguous."""
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    delta = torch.empty_like(lse)
    heads, head_dim = q.shape[-2:]
    key_heads, count = k.shape[-2], call.sequences(q)
    bounds = (call.cu_seqlens_q, call.cu_seqlens_k)
    options = (heads // key_heads, call.scale, *call.scales(), call.window or 0)
    if call.longest_q * count * heads:
        block = tiles.tile("delta", q.device, head_dim, q.element_size()).queries
        size = tiles.tile("queries", q.device, head_dim, q.element_size())
        switches = tile.constants(call, head_dim, size, (k, v))
        delta_kernel[(triton.cdiv(call.longest_q, block) * count * heads,)](
            out, d_out, d_lse, delta, call.cu_seqlens_q, *call.strides(out, d_out, lse), call.longest_q, heads,
            HEAD_DIM=head_dim, BLOCK_D=switches["BLOCK_D"], BLOCK_T=block, PACKED=switches["PACKED"],
        )  # fmt: skip
        dq_kernel[(triton.cdiv(call.longest_q, size.queries) * count * heads,)](
            q, k, v, d_out, dq, lse, delta, *bounds, *call.strides(q, k, v, d_out, dq, lse),
            call.longest_q, call.longest_k, heads, *options, **switches,
        )  # fmt: skip
    if call.longest_k * count * key_heads:
        size = tiles.tile("keys", q.device, head_dim, q.element_size())
        switches = tile.constants(call, head_dim, size, (q, k, v, d_out))
        dk_dv_kernel[(triton.cdiv(call.longest_k, size.keys) * count * key_heads,)](
            q, k, v, d_out, dk, dv, lse, delta, *bounds, *call.strides(q, k, v, d_out, dk, dv, lse),
            call.longest_q, call.longest_k, key_heads, *options, SPLIT=size.split, **switches,
        )  # fmt: skip
    return dq, dk, dv
