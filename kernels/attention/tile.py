"""The attention kernels share this: how a tile is read, which keys a query sees, and how a launch is prepared.

Positions are counted so that the last query has the position of the last key: position = row + keys - queries.
"""

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.jit import Launch, jit
from kernels.tiles import Tile


@jit
def program(length, heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Return the first row of the block, the sequence and the head that this program works on.

    All three share axis 0 of the grid: CUDA limits the other axes to 65,535 programs, and a large packed batch has more
    sequences times heads. In a causal sequence the last queries see the most keys. With LAST_FIRST their programs start
    first, so that no long program is left running alone at the end.
    """
    blocks = tl.cdiv(length, BLOCK)
    block = (blocks - 1 - tl.program_id(0) % blocks) if LAST_FIRST else tl.program_id(0) % blocks
    return block * BLOCK, tl.program_id(0) // blocks // heads, tl.program_id(0) // blocks % heads


@jit
def sequence(
    cu_seqlens_ptr,  # int32 [sequences + 1], or any pointer where PACKED is false
    index,  # number of the sequence in the batch
    length,  # of a dense batch
    PACKED: tl.constexpr,
):
    """Return how many tokens lie before sequence `index` in the batch (int64), and its number of tokens."""
    if PACKED:
        start = tl.load(cu_seqlens_ptr + index).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + index + 1).to(tl.int64)
        return start, (end - start).to(tl.int32)
    return index.to(tl.int64) * length, length


@jit
def begin(start, index, head, stride_batch, stride_token, stride_head, PACKED: tl.constexpr):
    """Return where a head of sequence `index` begins in a tensor of any strides. `start` is what `sequence` gave.

    The offset is int64: a tensor may have more than 2^31 elements.
    """
    if PACKED:
        return start * stride_token + head.to(tl.int64) * stride_head
    return index.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head


@jit
def lse_begin(start, head, heads, tokens, PACKED: tl.constexpr):
    """Return where a head of a sequence begins in a log-sum-exp, [B, heads, tokens] or packed [heads, tokens].

    Its tokens lie side by side, since a program reads and writes it for the rows of one head.
    """
    if PACKED:
        return head.to(tl.int64) * tokens + start
    return start * heads + head.to(tl.int64) * tokens


@jit
def matrix(
    base_ptr, rows, stride_row,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Return what load reads a [rows, HEAD_DIM] matrix through: its pointer, or a descriptor.

    A descriptor tells the copy engine (TMA) the shape of the matrix once, and a tile is then fetched by its corner.
    With a pointer, every thread computes the addresses of its elements and a mask for the edges, which take registers.
    The copy engine finds both by itself. It exists since sm_90, and wants rows that begin at multiples of 16 bytes.
    """
    if DESCRIPTOR:
        return tl.make_tensor_descriptor(base_ptr, [rows, HEAD_DIM], [stride_row, 1], [BLOCK, BLOCK_D])
    else:  # noqa: RET505 - what follows a return is compiled too, and would have another type
        return base_ptr


@jit
def load(
    source, row, rows, stride_row,  # source is what `matrix` gave
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, DESCRIPTOR: tl.constexpr,
    EDGE: tl.constexpr = True,  # false only where all rows of the tile exist
):  # fmt: skip
    """Return rows [row, row + BLOCK), zero beyond the edges of the matrix: [BLOCK, BLOCK_D]."""
    if DESCRIPTOR:
        return source.load([row, 0])
    else:  # noqa: RET505 - as above
        o_d = tl.arange(0, BLOCK_D)
        o_row = row + tl.arange(0, BLOCK)
        pointers = source + o_row[:, None].to(tl.int64) * stride_row + o_d[None, :]
        if EDGE:
            inside = (o_row < rows)[:, None]
            if BLOCK_D != HEAD_DIM:
                inside = inside & (o_d < HEAD_DIM)[None, :]
            b_tile = tl.load(pointers, mask=inside, other=0.0)
        elif BLOCK_D != HEAD_DIM:
            b_tile = tl.load(pointers, mask=(o_d < HEAD_DIM)[None, :], other=0.0)
        else:
            b_tile = tl.load(pointers)
        return b_tile


@jit
def store(base_ptr, value, row, rows, stride_row, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr):
    o_row = row + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    inside = (o_row < rows)[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (o_d < HEAD_DIM)[None, :]
    pointers = base_ptr + o_row[:, None].to(tl.int64) * stride_row + o_d[None, :]
    tl.store(pointers, value.to(base_ptr.dtype.element_ty), mask=inside)


@jit
def visible(o_query, o_key, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Return which keys each query may attend to, by position."""
    mask = o_key < keys
    if CAUSAL:
        mask = mask & (o_key <= o_query)
    if WINDOW:
        mask = mask & (o_query - o_key < window)
        if not CAUSAL:
            mask = mask & (o_key - o_query < window)
    return mask


# The score matrix of a causal attention has three kinds of tiles: below the diagonal every query sees every key, on it
# a mask decides, above it there is nothing to compute. keys_seen and queries_seeing find the borders, so that a kernel
# walks over the first kind in a loop without a mask, over the second in one with a mask, and skips the third.


@jit
def walk(PART: tl.constexpr, begin, full_begin, full_end, end):
    """Return where a loop of a kernel begins and ends. PART 1 needs no mask; 0 comes before it, and 2 after it."""
    if PART == 0:
        return begin, tl.minimum(full_begin, end)
    elif PART == 1:  # noqa: RET505 - as above
        return full_begin, full_end
    else:
        return full_end, end


@jit
def keys_seen(
    row, queries, keys, window, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """Return begin, full_begin, full_end and end for the queries [row, row + BLOCK_T).

    They see no key outside of [begin, end), and every one of them sees all keys of [full_begin, full_end). All but
    `end` are multiples of BLOCK_S.
    """
    first = row + keys - queries
    last = tl.minimum(row + BLOCK_T, queries) - 1 + keys - queries
    begin, full_begin = 0, 0
    end, full_end = keys, keys // BLOCK_S * BLOCK_S
    if CAUSAL:
        end = tl.minimum(keys, last + 1)
        full_end = tl.minimum(full_end, tl.maximum(first + 1, 0) // BLOCK_S * BLOCK_S)
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_S * BLOCK_S
        full_begin = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_S) * BLOCK_S
        if not CAUSAL:
            end = tl.minimum(keys, last + window)
            full_end = tl.minimum(full_end, tl.maximum(first + window, 0) // BLOCK_S * BLOCK_S)
    # The borders must not cross: full_begin is kept between `begin` and `end` (rounded up to a whole block), and
    # full_end is at least full_begin. If no key is seen by all queries, the middle range is then empty, and the outer
    # two meet.
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.cdiv(tl.maximum(end, begin), BLOCK_S) * BLOCK_S)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@jit
def queries_seeing(
    key, queries, keys, window, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """Return begin, full_begin, full_end and end for the keys [key, key + BLOCK_S).

    No query outside of rows [begin, end) sees one of them, and every row of [full_begin, full_end) sees them all. All
    but the last two are multiples of BLOCK_T.
    """
    shift = keys - queries
    begin, full_begin = 0, 0
    end, full_end = queries, queries
    if CAUSAL:
        begin = tl.maximum(key - shift, 0) // BLOCK_T * BLOCK_T
        full_begin = tl.cdiv(tl.maximum(key + BLOCK_S - 1 - shift, 0), BLOCK_T) * BLOCK_T
    if WINDOW:
        end = tl.minimum(queries, tl.maximum(key + BLOCK_S - 1 + window - shift, 0))
        full_end = tl.minimum(queries, tl.maximum(key + window - shift, 0)) // BLOCK_T * BLOCK_T
        if not CAUSAL:
            begin = tl.maximum(key - window + 1 - shift, 0) // BLOCK_T * BLOCK_T
            full_begin = tl.cdiv(tl.maximum(key + BLOCK_S - window - shift, 0), BLOCK_T) * BLOCK_T
    # The borders must not cross, as in keys_seen.
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.cdiv(tl.maximum(end, begin), BLOCK_T) * BLOCK_T)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@jit
def softmax_step(b_s, b_max, b_sum, unit, MASKED: tl.constexpr):
    """Take a block of scores into an online softmax. Return b_p, what rescales the output so far, b_max and b_sum.

    b_s [BLOCK_T, BLOCK_S] times `unit` are scores in units of log2; b_max and b_sum are fp32 [BLOCK_T]. b_sum and the
    output hold sums of exp2(score - b_max) with the largest score so far. Where this block has a larger one,
    exp2(old - new) turns them into the sums relative to that. So no exponential exceeds 1, and since numerator and
    denominator are relative to the same maximum, it drops out of the quotient at the end.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * unit)
    # A row that has seen no key yet has a maximum of -inf, and -inf - -inf is NaN.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
    # `unit` waits for the exponential, where one instruction multiplies and subtracts.
    b_p = tl.exp2(b_s * unit - b_shift[:, None])
    b_rescale = tl.exp2(b_max - b_shift)
    return b_p, b_rescale, b_new, b_sum * b_rescale + tl.sum(b_p, 1)


@cache
def launch(
    function: Any, size: Tile, head_dim: int, switches: tuple[bool, ...], suits_the_copy_engine: bool,
    **more: bool,
) -> Launch:  # fmt: skip
    """Return a kernel that walks over tiles of this size, with its constants. See Call.switches."""
    names = ("CAUSAL", "WINDOW", "SOFTCAP", "PACKED")
    return Launch(
        function, HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_T=size.queries,
        BLOCK_S=size.keys, num_warps=size.warps, num_stages=size.stages, **dict(zip(names, switches, strict=True)),
        DESCRIPTOR=size.descriptors and suits_the_copy_engine, **more,
    )  # fmt: skip


def suits_the_copy_engine(*tensors: Tensor) -> bool:
    """Return whether rows of the tensors begin at multiples of 16 bytes."""
    starts = 0
    for tensor in tensors:
        size = tensor.element_size()
        starts |= tensor.data_ptr()
        for stride in tensor.stride()[:-1]:
            starts |= stride * size
    return starts % 16 == 0
