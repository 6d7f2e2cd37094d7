"""What the attention kernels share: how a tile is read, which keys a query sees, how a score is capped.

Positions of queries are counted so that the last query stands at the last key: position = row + keys - queries.
"""

import triton
import triton.language as tl


@triton.jit
def sequence(
    cu_seqlens_ptr,  # int32 [sequences + 1], or any pointer where PACKED is false
    index,  # number of the sequence in the batch
    length,  # tokens of every sequence of a dense batch
    stride_batch,  # of a dense batch
    stride_token,
    PACKED: tl.constexpr,
):
    """Where sequence `index` begins, in elements (int64: a tensor may pass 2^31 of them), and its number of tokens."""
    if PACKED:
        start = tl.load(cu_seqlens_ptr + index).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + index + 1).to(tl.int64)
        return start * stride_token, (end - start).to(tl.int32)
    return index.to(tl.int64) * stride_batch, length


@triton.jit
def matrix(
    base_ptr,
    rows,
    stride_row,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """What load_tile reads a [rows, HEAD_DIM] matrix through: its pointer, or a descriptor for the copy engine (TMA).

    The copy engine finds addresses and edges by itself, which frees the registers that pointers and masks take.
    """
    if DESCRIPTOR:
        return tl.make_tensor_descriptor(base_ptr, [rows, HEAD_DIM], [stride_row, 1], [BLOCK, BLOCK_D])
    else:  # noqa: RET505 - what follows a return is compiled too, and would have another type
        return base_ptr


@triton.jit
def load_tile(
    source,  # of `matrix`
    row,
    rows,
    stride_row,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EDGE: tl.constexpr = True,  # false only where all rows of the tile exist
):
    """Rows [row, row + BLOCK), zero beyond the edges of the matrix."""
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


@triton.jit
def store_tile(
    base_ptr, value, row, rows, stride_row, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr
):
    o_row = row + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    inside = (o_row < rows)[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (o_d < HEAD_DIM)[None, :]
    pointers = base_ptr + o_row[:, None].to(tl.int64) * stride_row + o_d[None, :]
    tl.store(pointers, value.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def visible(o_query, o_key, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys each query may attend to, by position."""
    mask = o_key < keys
    if CAUSAL:
        mask = mask & (o_key <= o_query)
    if WINDOW:
        mask = mask & (o_query - o_key < window)
        if not CAUSAL:
            mask = mask & (o_key - o_query < window)
    return mask


@triton.jit
def keys_seen(
    row, queries, keys, window, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """begin, full_begin, full_end, end: the queries [row, row + BLOCK_T) see nothing outside of keys [begin, end), and
    every one of them sees all of [full_begin, full_end). All but `end` are multiples of BLOCK_S."""
    first = row + keys - queries
    last = tl.minimum(row + BLOCK_T, queries) - 1 + keys - queries
    begin = 0
    full_begin = 0
    end = keys
    full_end = keys // BLOCK_S * BLOCK_S
    if CAUSAL:
        end = tl.minimum(keys, last + 1)
        full_end = tl.minimum(full_end, tl.maximum(first + 1, 0) // BLOCK_S * BLOCK_S)
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_S * BLOCK_S
        full_begin = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_S) * BLOCK_S
        if not CAUSAL:
            end = tl.minimum(keys, last + window)
            full_end = tl.minimum(full_end, tl.maximum(first + window, 0) // BLOCK_S * BLOCK_S)
    # Where no key is seen by all, the middle range is empty and the outer two meet.
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.cdiv(tl.maximum(end, begin), BLOCK_S) * BLOCK_S)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def queries_seeing(
    key, queries, keys, window, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """begin, full_begin, full_end, end: no query outside of rows [begin, end) sees one of the keys [key, key +
    BLOCK_S), and every row of [full_begin, full_end) sees them all. All but the last two are multiples of BLOCK_T."""
    shift = keys - queries
    begin = 0
    full_begin = 0
    end = queries
    full_end = queries
    if CAUSAL:
        begin = tl.maximum(key - shift, 0) // BLOCK_T * BLOCK_T
        full_begin = tl.cdiv(tl.maximum(key + BLOCK_S - 1 - shift, 0), BLOCK_T) * BLOCK_T
    if WINDOW:
        end = tl.minimum(queries, tl.maximum(key + BLOCK_S - 1 + window - shift, 0))
        full_end = tl.minimum(queries, tl.maximum(key + window - shift, 0)) // BLOCK_T * BLOCK_T
        if not CAUSAL:
            begin = tl.maximum(key - window + 1 - shift, 0) // BLOCK_T * BLOCK_T
            full_begin = tl.cdiv(tl.maximum(key + BLOCK_S - window - shift, 0), BLOCK_T) * BLOCK_T
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.cdiv(tl.maximum(end, begin), BLOCK_T) * BLOCK_T)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def tanh(x):
    """To the last bits also near 0, where 1 - 2 / (1 + exp(2x)) would cancel: there Cephes' polynomial (tanhf)."""
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = (series * z - 5.37397155531e-2) * z + 1.33314422036e-1
    series = (series * z - 3.33332819422e-1) * z * x + x
    return tl.where(z < 0.390625, series, 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268)))
