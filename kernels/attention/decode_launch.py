"""Decode attention on a GPU: how many splits, which launches, and the operator that torch.compile sees."""

from typing import Any, Optional

import torch
import triton
from torch import Tensor

from kernels.attention.call import Call
from kernels.attention.decode_kernel import decode_kernel, merge_kernel
from kernels.attention.launch import scales
from kernels.tiles import tile

# So many programs per multiprocessor keep it reading while one starts and another ends.
PROGRAMS = 4
# Keys of a split. With fewer a program is over before its loads are under way; with more, one long sequence in a batch
# of short ones runs on alone.
FEWEST, MOST = 256, 4096
MOST_SPLITS = 256
# Of a split, for each row of the key head: what rows leave behind, fp32, takes at most a sixteenth of a bf16 cache.
KEYS_PER_ROW = 16


def splits(programs: int, rows: int, keys: int, device: torch.device) -> int:
    """Into how many parts the keys are split, where `programs` programs share each part, and `rows` rows a key head.

    By the room in the cache, not the lengths, which only the GPU knows. A power of two, so that few kernels are
    compiled.
    """
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = max(PROGRAMS * units // programs, keys // MOST)
    allowed = min(keys // max(FEWEST, KEYS_PER_ROW * rows), MOST_SPLITS)
    return 1 << max(min(wanted, allowed), 1).bit_length() - 1


@torch.library.custom_op("gpt::decode_attention", mutates_args=())
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Optional[Tensor],  # noqa: UP045 - as in operators.py
    scale: float,
    window: Optional[int],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
) -> Tensor:
    """out like q, contiguous."""
    batch, queries, heads, head_dim = q.shape
    page = 0 if block_table is None else k_cache.shape[1]
    keys = k_cache.shape[1] if block_table is None else page * block_table.shape[1]
    key_heads = k_cache.shape[2]
    rows = queries * (heads // key_heads)
    # 16 rows are the fewest that the tensor cores multiply.
    size = tile("decode" if rows <= 16 else "decode-tall", q.device, head_dim, q.element_size())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    programs = batch * key_heads * triton.cdiv(rows, size.queries)
    if not programs:
        return out
    count = splits(programs, rows, keys, q.device)
    part, lse = out, None
    if count > 1:
        part = torch.empty((batch, queries, heads, count, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((batch, queries, heads, count), dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    call = Call(True, scale, window, softcap, None, None, queries, keys)
    decode_kernel[(programs * count,)](
        q, k_cache, v_cache, part, lse, cache_lengths.contiguous(), block_table,
        *q.stride()[:-1], *k_cache.stride()[:-1], *v_cache.stride()[:-1],
        0 if block_table is None else block_table.stride(0),
        queries, keys, key_heads, heads // key_heads, count, *scales(call), min(window or 0, keys),
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_T=size.queries, BLOCK_S=size.keys, WINDOW=window is not None,
        SOFTCAP=softcap is not None, PAGE=page, SPLIT=count > 1, num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    if count > 1:
        # 4,096 numbers are few enough to be loaded all at once; 16 in a row fill two sectors of memory.
        width = min(max(4096 // count, 16), block_d)
        merge_kernel[(batch * queries * heads * triton.cdiv(head_dim, width),)](
            part, lse, out, HEAD_DIM=head_dim, BLOCK_D=width, SPLITS=count
        )
    return out


@decode.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)
