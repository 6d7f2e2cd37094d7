"""decode_attention: a few new tokens per sequence against a cache of keys and values."""

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, *, scale: float | None = None
) -> Tensor:
    """Causal attention of the T newest tokens of each sequence.

    q [B, T, H, D]; k_cache, v_cache [B, S, Hkv, D], of which the first cache_lengths[b] entries (int [B], the new
    tokens counted in) belong to sequence b. Query t stands at position cache_lengths[b] - T + t. Returns [B, T, H,
    D].
    """
    queries, keys = q.shape[1], k_cache.shape[1]
    position_BT = cache_lengths[:, None] - queries + torch.arange(queries, device=q.device)
    visible_BTS = torch.arange(keys, device=q.device) <= position_BT[:, :, None]
    out_BHTD = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        attn_mask=visible_BTS[:, None],
        scale=scale,
        enable_gqa=q.shape[2] != k_cache.shape[2],
    )
    return out_BHTD.transpose(1, 2)
