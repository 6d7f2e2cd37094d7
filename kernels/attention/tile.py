"""What the attention kernels share: how a tile is read, which keys a query sees, how a score is capped."""

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
def load_tile(base_ptr, row, rows, stride_row, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows [row, row + BLOCK) of a [rows, HEAD_DIM] matrix, zero beyond its edges."""
    o_row = row + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    inside = (o_row < rows)[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (o_d < HEAD_DIM)[None, :]
    return tl.load(base_ptr + o_row[:, None].to(tl.int64) * stride_row + o_d[None, :], mask=inside, other=0.0)


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
    """Which keys each query may attend to. o_query holds positions aligned so that the last query is the last key."""
    mask = o_key < keys
    if CAUSAL:
        mask = mask & (o_key <= o_query)
    if WINDOW:
        mask = mask & (o_query - o_key < window)
        if not CAUSAL:
            mask = mask & (o_key - o_query < window)
    return mask


@triton.jit
def tanh(x):
    # 1 - 2 / (1 + exp(2x)): right at both infinities, and there is no tanh in the language itself.
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
