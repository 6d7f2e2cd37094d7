"""One block of logits in Triton, for what is known of its rows and for the gradient: the kernel and its launch.

A program takes a row, in two sweeps: the first with a running maximum (Milakov & Gimelshein, arXiv:1805.02867), the
second over what the L2 cache still holds, writing the gradient. In memory the block is read once and written once.

Names: b_ is a block in registers, o_ are offsets.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy_torch import LogitsGradient, Options, Rows
from kernels.jit import Launch, jit, kernel, tanh


@jit
def _logits(
    row_ptr, o_v, vocab, stride, softcap, inverse_temperature, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Return products of a row, of any floating dtype, as logits: capped, over the temperature, fp32 [BLOCK_V]."""
    b_z = tl.load(row_ptr + o_v, mask=o_v < stride, other=0.0).to(tl.float32)
    if SOFTCAP:
        b_z = softcap * tanh(b_z / softcap)
    # Columns beyond the vocabulary get a score that exp turns into 0. It is not -inf, because 0 * inf is NaN.
    return tl.where(o_v < vocab, b_z * inverse_temperature, -1e38)


@kernel
def rows_kernel(
    logits_ptr,  # [R, V]
    gradient_ptr,  # [R, V], of the same strides: by the products, written where GRADIENT. It may be the logits itself
    targets_ptr,  # int64 [R]
    log_probs_ptr,  # fp32 [R] like the other five; with STATISTICS written, else not used
    lse_ptr,  # with STATISTICS written, else read
    entropy_ptr,  # the same, where ENTROPY
    d_log_probs_ptr, d_lse_ptr,  # gradients of the result, read where GRADIENT and not STATISTICS
    d_entropy_ptr,  # the same, where ENTROPY
    vocab,
    stride,  # of a row of logits: as far as it may be read and written. A multiple of 16 makes for whole vectors
    ignore_index,
    z_loss,  # with STATISTICS and GRADIENT: of the sum of z_loss * lse^2 - log p(target)
    softcap, inverse_temperature,
    STATISTICS: tl.constexpr, GRADIENT: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
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
        # Read before the row is overwritten. A target that does not exist gives NaN.
        chosen = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        if SOFTCAP:
            chosen = softcap * tanh(chosen / softcap)
        chosen *= inverse_temperature
        # Online log-sum-exp: b_sum holds sums of exp(z - highest), with the highest logit so far. Where a step brings a
        # higher one, exp(highest - new) turns them into the sums relative to that, so that nothing overflows and one
        # sweep is enough. Each lane keeps a sum of its own: they are added up once, at the end, not in every step.
        highest = -1e38
        b_sum = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, vocab, BLOCK_V):
            o_v = start + tl.arange(0, BLOCK_V)
            b_z = _logits(row_ptr, o_v, vocab, stride, softcap, inverse_temperature, SOFTCAP)
            new = tl.maximum(highest, tl.max(b_z, 0))
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
        # d log p(target) / dz = [is target] - p,  d lse / dz = p,  d entropy / dz = -p * (log p + entropy)
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


def tile(vocab: int) -> tuple[int, int]:
    """Return how many logits a program takes in a step, and its warps.

    A thread takes 16 logits in a step: four loads of 16 bytes on their way. That takes up to 64 registers, so that a
    multiprocessor has room for about 1,024 threads. Longer rows get more warps, and so fewer rows are worked on at a
    time: 4, 2 or 1 on each of an H200's 132 multiprocessors, which is at most 17, 34 and 68 MB of up to 8k, 32k and
    128k fp32 logits. All but the longest fit its L2 cache of 50 MB, from which the second sweep reads them.
    """
    warps = 8 if vocab <= 8192 else 16 if vocab <= 32768 else 32
    return min(512 * warps, triton.next_power_of_2(vocab)), warps


def step(
    raw: Tensor, targets: Tensor, rows: Rows, upstream: Rows | None, options: Options, z_loss: float | None,
    dtype: torch.dtype,
) -> LogitsGradient | None:  # fmt: skip
    """Do what cross_entropy_torch.step does, in one launch. The gradient may take the place of the products."""
    matrix, vocab = raw, raw.shape[1]
    wanted = upstream is not None or z_loss is not None
    if wanted and raw.dtype != dtype:
        # The kernel takes the strides of the products for those of the gradient.
        matrix = torch.empty(len(raw), raw.stride(0), dtype=dtype, device=raw.device)[:, :vocab]
    launch = rows_launch(
        tile(vocab), STATISTICS=upstream is None, GRADIENT=wanted, ENTROPY=(upstream or rows).entropy is not None,
        SOFTCAP=options.softcap is not None,
    )  # fmt: skip
    launch(
        (len(targets), 1, 1), (raw, matrix, targets.contiguous(), *rows, *(upstream or (None, None, None))),
        (vocab, raw.stride(0), options.ignore_index),
        (float(z_loss or 0), float(options.softcap or 0), 1 / options.temperature),
    )  # fmt: skip
    return LogitsGradient(matrix) if wanted else None


@cache
def rows_launch(size: tuple[int, int], **switches: bool) -> Launch:
    return Launch(rows_kernel, BLOCK_V=size[0], num_warps=size[1], **switches)
