"""The kernel between the products: a program takes a row of logits, for what is known of it, and for its gradient.

Two sweeps over the row: the first with a running maximum (Milakov & Gimelshein, arXiv:1805.02867), the second over what
the L2 cache still holds, writing the gradient. In memory the block is read once and written once.

Names: b_ a block in registers, o_ offsets.
"""

import triton
import triton.language as tl

from kernels.attention.tile import tanh


@triton.jit
def _logits(
    row_ptr,  # of the products, any floating dtype
    o_v,
    vocab,
    stride,
    softcap,
    inverse_temperature,
    SOFTCAP: tl.constexpr,
):
    """Capped and divided by the temperature, fp32. Beyond the vocabulary what exp turns into 0: not -inf, for 0 times
    that is NaN."""
    b_z = tl.load(row_ptr + o_v, mask=o_v < stride, other=0.0).to(tl.float32)
    if SOFTCAP:
        b_z = softcap * tanh(b_z / softcap)
    return tl.where(o_v < vocab, b_z * inverse_temperature, -1e38)


@triton.jit
def rows_kernel(
    logits_ptr,  # [R, V]
    gradient_ptr,  # [R, V], of the same strides: by the products, written where GRADIENT. It may be the logits itself
    targets_ptr,  # int64 [R]
    log_probs_ptr,  # fp32 [R] like the other five; with STATISTICS written, else not used
    lse_ptr,  # with STATISTICS written, else read
    entropy_ptr,  # the same, where ENTROPY
    d_log_probs_ptr,  # gradients of the result, read where GRADIENT and not STATISTICS
    d_lse_ptr,
    d_entropy_ptr,  # where ENTROPY
    vocab,
    stride,  # of a row of logits: as far as it may be read and written. A multiple of 16 makes for whole vectors
    ignore_index,
    z_loss,  # with STATISTICS and GRADIENT: of the sum of z_loss * lse^2 - log p(target)
    softcap,
    inverse_temperature,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    wide_ptr = gradient_ptr + row * stride
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        if STATISTICS:
            tl.store(log_probs_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
            if ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK_V):
                o_v = start + tl.arange(0, BLOCK_V)
                tl.store(wide_ptr + o_v, tl.zeros([BLOCK_V], wide_ptr.dtype.element_ty), mask=o_v < stride)
        return

    known = (target >= 0) & (target < vocab)
    if STATISTICS:
        # Read before the row is overwritten. NaN for a target that there is none of.
        chosen = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        if SOFTCAP:
            chosen = softcap * tanh(chosen / softcap)
        chosen *= inverse_temperature
        highest = -1e38
        b_sum = tl.zeros([BLOCK_V], tl.float32)  # of exp(z - highest)
        for start in range(0, vocab, BLOCK_V):
            o_v = start + tl.arange(0, BLOCK_V)
            b_z = _logits(row_ptr, o_v, vocab, stride, softcap, inverse_temperature, SOFTCAP)
            new = tl.maximum(highest, tl.max(b_z, 0))
            # Kept by lane: one sum over lanes at the end in place of one in every step.
            b_sum = b_sum * tl.exp(highest - new) + tl.exp(b_z - new)
            highest = new
        log_total = tl.log(tl.sum(b_sum, 0))
        lse = highest + log_total
        tl.store(log_probs_ptr + row, chosen - highest - log_total)
        tl.store(lse_ptr + row, lse)
        if ENTROPY:
            b_entropy = tl.zeros([BLOCK_V], tl.float32)
            for start in range(0, vocab, BLOCK_V):
                o_v = start + tl.arange(0, BLOCK_V)
                b_log_p = _logits(row_ptr, o_v, vocab, stride, softcap, inverse_temperature, SOFTCAP) - lse
                b_entropy -= tl.exp(b_log_p) * b_log_p
            tl.store(entropy_ptr + row, tl.sum(b_entropy, 0))
    else:
        lse = tl.load(lse_ptr + row)

    if GRADIENT:
        if STATISTICS:
            d_log_prob = -1.0
            d_lse = 2.0 * z_loss * lse
        else:
            d_log_prob = tl.load(d_log_probs_ptr + row)
            d_lse = tl.load(d_lse_ptr + row)
            if ENTROPY:
                entropy = tl.load(entropy_ptr + row)
                d_entropy = tl.load(d_entropy_ptr + row)
        d_log_prob = tl.where(known, d_log_prob, float("nan"))
        for start in range(0, vocab, BLOCK_V):
            o_v = start + tl.arange(0, BLOCK_V)
            b_z = _logits(row_ptr, o_v, vocab, stride, softcap, inverse_temperature, SOFTCAP)
            b_log_p = b_z - lse
            b_slope = d_lse - d_log_prob
            if ENTROPY and not STATISTICS:
                b_slope -= d_entropy * (b_log_p + entropy)
            b_d = tl.exp(b_log_p) * b_slope + tl.where(o_v == target.to(tl.int32), d_log_prob, 0.0)
            if SOFTCAP:
                b_tanh = b_z / (softcap * inverse_temperature)
                b_d *= 1.0 - b_tanh * b_tanh
            tl.store(wide_ptr + o_v, (b_d * inverse_temperature).to(wide_ptr.dtype.element_ty), mask=o_v < stride)
