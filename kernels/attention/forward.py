"""Flash attention, forward: the kernel and its launch.

A program holds a block of queries, a running row maximum and row sum, and the output so far. It walks over the keys
that its queries see, a block at a time, and scores never leave the chip (Milakov & Gimelshein, arXiv:1805.02867; Dao,
arXiv:2307.08691).

Names: b_ is a block in registers, o_ are offsets. Sizes: T queries, S keys, D head dim.
"""

import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.attention import tile
from kernels.attention.reference import Call, empty_results
from kernels.jit import kernel, tanh


@kernel
def forward_kernel(
    q_ptr, k_ptr, v_ptr,  # [B, length, heads, HEAD_DIM], or [tokens, heads, HEAD_DIM] where PACKED
    out_ptr,  # like q, contiguous
    lse_ptr,  # fp32 [B, heads, tokens] or [heads, tokens], natural logarithm
    cu_q_ptr, cu_k_ptr,  # int32 [sequences + 1] where PACKED, else not read
    stride_q_batch, stride_q_token, stride_q_head, stride_k_batch, stride_k_token, stride_k_head,
    stride_v_batch, stride_v_token, stride_v_head,
    heads, group,  # query heads, and how many of them share a key head
    tokens,  # queries of the whole batch where PACKED, else of a sequence
    queries, keys,  # per sequence; where PACKED, of the longest
    window,
    scale,  # without a softcap: softmax scale * log2(e); with a softcap c: softmax scale / c
    softcap_log2,  # c * log2(e)
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    row, batch, head = tile.program(queries, heads, BLOCK_T, True)  # True: the last rows first
    q_start, queries = tile.sequence(cu_q_ptr, batch, queries, PACKED)
    k_start, keys = tile.sequence(cu_k_ptr, batch, keys, PACKED)
    if row >= queries:
        return
    q_ptr += tile.begin(q_start, batch, head, stride_q_batch, stride_q_token, stride_q_head, PACKED)
    k_ptr += tile.begin(k_start, batch, head // group, stride_k_batch, stride_k_token, stride_k_head, PACKED)
    v_ptr += tile.begin(k_start, batch, head // group, stride_v_batch, stride_v_token, stride_v_head, PACKED)
    k = tile.matrix(k_ptr, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    v = tile.matrix(v_ptr, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)

    o_query = row + keys - queries + tl.arange(0, BLOCK_T)
    b_q = tile.load(q_ptr, row, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM, False)
    b_out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    begin, full_begin, full_end, end = tile.keys_seen(row, queries, keys, window, BLOCK_T, BLOCK_S, CAUSAL, WINDOW)
    # The parts are unrolled, each into a loop of its own: 0 and 2 need a mask, 1 does not.
    for part in tl.static_range(0 if WINDOW else 1, 3):
        first, last = tile.walk(part, begin, full_begin, full_end, end)
        for key in tl.range(first, last, BLOCK_S):
            b_k = tile.load(k, key, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR, part != 1)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
            unit = scale  # what turns b_s into scores in units of log2
            if SOFTCAP:
                b_s = tanh(b_s * scale)
                unit = softcap_log2
            if part != 1:
                o_key = key + tl.arange(0, BLOCK_S)
                mask = tile.visible(o_query[:, None], o_key[None, :], keys, window, CAUSAL, WINDOW)
                b_s = tl.where(mask, b_s, float("-inf"))
            b_p, b_rescale, b_max, b_sum = tile.softmax_step(b_s, b_max, b_sum, unit, part != 1)
            b_v = tile.load(v, key, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR, part != 1)
            b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None], input_precision="ieee")

    # A row that saw no key has sum 0 and maximum -inf. It gives 0, and -inf for its log-sum-exp.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    out_ptr += (q_start * heads + head) * HEAD_DIM
    tile.store(out_ptr, b_out, row, queries, heads * HEAD_DIM, BLOCK_T, BLOCK_D, HEAD_DIM)
    # log(sum of exp(s)) = (maximum + log2(sum of exp2(s - maximum))) * ln(2): with it, exp(s - lse) gives the backward
    # pass any probability again, without maximum and sum.
    b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    lse_ptr += tile.lse_begin(q_start, head, heads, tokens, PACKED)
    o_row = row + tl.arange(0, BLOCK_T)
    tl.store(lse_ptr + o_row, b_lse, mask=o_row < queries)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out like q, contiguous, and the log-sum-exp, fp32 [B, H, T] or [H, tokens]."""
    out, lse = empty_results(q)
    heads, head_dim = q.shape[-2:]
    size = tiles.tile("forward", q.device, head_dim, q.element_size(), max(call.longest_q, call.longest_k))
    launch = tile.launch(forward_kernel, size, head_dim, call.switches(), tile.suits_the_copy_engine(q, k, v))
    programs = -(-call.longest_q // size.queries) * call.sequences(q) * heads
    if programs:
        launch(
            (programs, 1, 1), (q, k, v, out, lse, call.cu_seqlens_q, call.cu_seqlens_k),
            (*call.strides(q, k, v), heads, heads // k.shape[-2]),
            (lse.shape[-1], call.longest_q, call.longest_k, call.window or 0, *call.scales()),
        )  # fmt: skip
    return out, lse
