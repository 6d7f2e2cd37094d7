"""Attention of a few new tokens over a long cache: the decode kernel, the merge kernel, and their launches.

A program holds the queries of all heads that share a key head, row = token * group + member, so that every key is read
once. One such program alone would leave most of a GPU idle, so that several share the keys of a sequence: each leaves
the softmax of its own keys with their log-sum-exp, and a second kernel merges them (Flash-Decoding, Dao et al. 2023).

Lengths are read on the device, and the grid depends on shapes alone: a CUDA graph can be replayed as sequences grow.
Names: b_ is a block in registers, o_ are offsets.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.attention import tile
from kernels.attention.reference import Call
from kernels.jit import Launch, jit, kernel, tanh
from kernels.tiles import Tile

# So many programs per multiprocessor keep it reading while one starts and another ends.
PROGRAMS = 4
# Keys of a split. With fewer, a program is over before its loads are under way; with more, one long sequence in a batch
# of short ones runs on alone.
FEWEST, MOST = 256, 4096
MOST_SPLITS = 256
# The keys of a split for each row of the key head. With this number, the partial results of the rows, in fp32, take at
# most a sixteenth of the memory of a bf16 cache.
KEYS_PER_ROW = 16


@jit
def _blocks(table_ptr, key, end, BLOCK_S: tl.constexpr, PAGE: tl.constexpr):
    """Return the numbers of the blocks that hold keys [key, key + BLOCK_S), int64."""
    o_key = key + tl.arange(0, BLOCK_S)
    return tl.load(table_ptr + o_key // PAGE, mask=o_key < end, other=0).to(tl.int64)


@jit
def _load_keys(
    base_ptr,  # of the head
    o_start,  # [BLOCK_S] or one for all, int64: where their sequence or block begins
    o_row,  # [BLOCK_S] their rows there
    inside,  # [BLOCK_S]
    stride_row, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Return a tile of keys or values, [BLOCK_S, BLOCK_D]."""
    o_d = tl.arange(0, BLOCK_D)
    pointers = base_ptr + (o_start + o_row.to(tl.int64) * stride_row)[:, None] + o_d[None, :]
    mask = inside[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (o_d < HEAD_DIM)[None, :]
    # What lies in a cache beyond the length may be NaN, and 0 * NaN is NaN.
    return tl.load(pointers, mask=mask, other=0.0)


@kernel
def decode_kernel(
    q_ptr, k_ptr, v_ptr,
    out_ptr,  # [batch, queries, heads, splits, HEAD_DIM], with SPLIT fp32
    lse_ptr,  # fp32 [batch, queries, heads, splits], in units of log2; written with SPLIT only
    lengths_ptr,  # int32 or int64 [batch], dense
    table_ptr,  # int32 [batch, blocks], read with PAGE only
    stride_q_batch, stride_q_token, stride_q_head,
    stride_k_batch, stride_k_token, stride_k_head,  # with PAGE, a batch is a block
    stride_v_batch, stride_v_token, stride_v_head,
    key_heads, group, stride_table_batch, splits,
    queries, keys,  # keys that the cache has room for, per sequence
    window, scale, softcap_log2,  # as in the forward kernel
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PAGE: tl.constexpr,  # keys per block of a paged cache, 0 where it is not paged
    SPLIT: tl.constexpr,  # splits > 1
):  # fmt: skip
    # Programs that read the same keys are neighbours, and share them in the L2 cache.
    blocks = tl.cdiv(queries * group, BLOCK_T)
    row = tl.program_id(0) % blocks * BLOCK_T
    split = tl.program_id(0) // blocks % splits
    head = tl.program_id(0) // blocks // splits % key_heads
    batch = (tl.program_id(0) // blocks // splits // key_heads).to(tl.int64)

    o_row = row + tl.arange(0, BLOCK_T)
    real = o_row < queries * group
    o_token = o_row // group
    o_head = head * group + o_row % group
    o_out = ((batch * queries + o_token) * key_heads * group + o_head) * splits + split

    # The keys that some row of this program sees are divided among the splits by the length of the sequence: even if it
    # is short and the cache large, every split gets an equal part.
    length = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), keys)
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - queries + row // group - window + 1, 0)
    end = tl.maximum(length - queries + tl.minimum((row + BLOCK_T - 1) // group, queries - 1) + 1, begin)
    share = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_S) * BLOCK_S
    begin += split * share
    end = tl.minimum(begin + share, end)
    if SPLIT:  # noqa: SIM102 - one is decided by the compiler, the other when it runs
        if begin >= end:
            tl.store(lse_ptr + o_out, tl.full([BLOCK_T], float("-inf"), tl.float32), mask=real)
            return

    o_d = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (o_d < HEAD_DIM)[None, :]
    o_q = batch * stride_q_batch + o_token.to(tl.int64) * stride_q_token + o_head.to(tl.int64) * stride_q_head
    b_q = tl.load(q_ptr + o_q[:, None] + o_d[None, :], mask=inside, other=0.0)  # [BLOCK_T, BLOCK_D]
    k_ptr += head.to(tl.int64) * stride_k_head
    v_ptr += head.to(tl.int64) * stride_v_head
    o_position = length - queries + o_token

    b_out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    start = batch  # where the keys of the tile begin: the number of the sequence, or the numbers of their blocks
    if PAGE:
        table_ptr += batch * stride_table_batch
        start = _blocks(table_ptr, begin, end, BLOCK_S, PAGE)
    for key in tl.range(begin, end, BLOCK_S):
        o_key = key + tl.arange(0, BLOCK_S)
        held = o_key < end
        o_place = o_key
        next_start = start
        if PAGE:
            o_place = o_key % PAGE
            # Looked up a tile ahead: the compiler loads keys early only where their addresses wait for no other load.
            next_start = _blocks(table_ptr, key + BLOCK_S, end, BLOCK_S, PAGE)
        b_k = _load_keys(k_ptr, start * stride_k_batch, o_place, held, stride_k_token, BLOCK_D, HEAD_DIM)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
        unit = scale
        if SOFTCAP:
            b_s = tanh(b_s * scale)
            unit = softcap_log2
        mask = tile.visible(o_position[:, None], o_key[None, :], end, window, True, WINDOW)
        b_s = tl.where(mask, b_s, float("-inf"))
        b_p, b_rescale, b_max, b_sum = tile.softmax_step(b_s, b_max, b_sum, unit, True)
        b_v = _load_keys(v_ptr, start * stride_v_batch, o_place, held, stride_v_token, BLOCK_D, HEAD_DIM)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None], input_precision="ieee")
        start = next_start

    # A row that saw no key has sum 0 and maximum -inf. It gives 0, and -inf for its log-sum-exp.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    tl.store(out_ptr + o_out[:, None] * HEAD_DIM + o_d[None, :], b_out.to(out_ptr.dtype.element_ty), mask=inside)
    if SPLIT:
        tl.store(lse_ptr + o_out, b_max + tl.log2(b_sum), mask=real)


@kernel
def merge_kernel(
    part_ptr,  # fp32 [rows, SPLITS, HEAD_DIM]; that of an empty split was never written
    lse_ptr,  # fp32 [rows, SPLITS], in units of log2
    out_ptr,  # [rows, HEAD_DIM]
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # columns of a program: a part of the head dim where there are many splits
    SPLITS: tl.constexpr,
):
    # A part is the softmax of its own keys, so that exp2(lse) * part is the sum of exp(score) * value over them. Hence
    # the whole is sum(exp2(lse) * part) / sum(exp2(lse)); the largest log-sum-exp is subtracted first, so that nothing
    # overflows. One program adds up all parts of a row, in the same order every time.
    chunks = tl.cdiv(HEAD_DIM, BLOCK_D)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    o_d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    o_part = row * SPLITS + tl.arange(0, SPLITS)
    b_lse = tl.load(lse_ptr + o_part)  # [SPLITS]
    b_max = tl.max(b_lse, 0)
    # exp2(-inf - -inf) would be NaN in a row that sees nothing.
    b_weight = tl.exp2(b_lse - tl.where(b_max == float("-inf"), 0.0, b_max))
    # All parts are loaded, even those that were never written, since only the log-sum-exps tell which these are and to
    # wait for them would take longer.
    b_part = tl.load(part_ptr + o_part[:, None] * HEAD_DIM + o_d[None, :], mask=(o_d < HEAD_DIM)[None, :], other=0.0)
    b_part = tl.where((b_lse > float("-inf"))[:, None], b_part, 0.0)  # [SPLITS, BLOCK_D]
    b_sum = tl.sum(b_weight, 0)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.where(b_sum == 0.0, 1.0, b_sum)
    tl.store(out_ptr + row * HEAD_DIM + o_d, b_out.to(out_ptr.dtype.element_ty), mask=o_d < HEAD_DIM)


def splits(programs: int, rows: int, keys: int, device: torch.device) -> int:
    """Return into how many parts the keys are split, where `programs` programs share each part.

    `rows` is how many rows a key head has. The room in the cache decides, not the lengths, which only the GPU knows. It
    is a power of two, so that few kernels are compiled.
    """
    wanted = max(PROGRAMS * tiles.multiprocessors(device) // programs, keys // MOST)
    allowed = min(keys // max(FEWEST, KEYS_PER_ROW * rows), MOST_SPLITS)
    return 1 << max(min(wanted, allowed), 1).bit_length() - 1


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None, call: Call
) -> Tensor:
    """Return out like q, contiguous: see op.decode_attention."""
    batch, queries, heads, head_dim = q.shape
    page = 0 if block_table is None else k_cache.shape[1]
    keys = k_cache.shape[1] if block_table is None else page * block_table.shape[1]
    key_heads = k_cache.shape[2]
    rows = queries * (heads // key_heads)
    # 16 rows are the fewest that the tensor cores multiply.
    size = tiles.tile("decode" if rows <= 16 else "decode-tall", q.device, head_dim, q.element_size(), keys)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    programs = batch * key_heads * triton.cdiv(rows, size.queries)
    if not programs:
        return out
    count = splits(programs, rows, keys, q.device)
    part, lse = out, None
    if count > 1:
        part = torch.empty((batch, queries, heads, count, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((batch, queries, heads, count), dtype=torch.float32, device=q.device)
    launch, merge = launches(head_dim, size, count, page, *call.switches()[1:3])
    launch(
        (programs * count, 1, 1),
        (q, k_cache, v_cache, part, lse, cache_lengths.contiguous(), block_table),
        (*q.stride()[:-1], *k_cache.stride()[:-1], *v_cache.stride()[:-1], key_heads, heads // key_heads),
        (
            0 if block_table is None else block_table.stride(0), count, queries, keys, min(call.window or 0, keys),
            *call.scales(),
        ),
    )  # fmt: skip
    if merge is not None:
        chunks = -(-head_dim // merge.constants["BLOCK_D"])
        merge((batch * queries * heads * chunks, 1, 1), (part, lse, out), ())
    return out


@cache
def launches(
    head_dim: int, size: Tile, splits: int, page: int, window: bool, softcap: bool
) -> tuple[Launch, Launch | None]:
    """Return the decode kernel with its constants, and the merge kernel where there is more than one split."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    launch = Launch(
        decode_kernel, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_T=size.queries, BLOCK_S=size.keys, WINDOW=window,
        SOFTCAP=softcap, PAGE=page, SPLIT=splits > 1, num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    # 4,096 numbers are few enough to be loaded all at once; 16 in a row fill two sectors of memory.
    width = min(max(4096 // splits, 16), block_d)
    return launch, Launch(merge_kernel, HEAD_DIM=head_dim, BLOCK_D=width, SPLITS=splits) if splits > 1 else None
