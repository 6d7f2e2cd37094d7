"""Attention written out in plain PyTorch: the definition that every other implementation is compared with.

It holds the whole [T, S] score matrix, works in any floating dtype including float64, and is differentiable.
"""

import torch
from torch import Tensor


def visible(
    queries: int, keys: int, *, causal: bool, window: int | None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Which keys each query may attend to: bool [T, S], or None where every query sees every key.

    The last query is aligned with the last key, so that T < S means "T new tokens after S - T old ones". `window`
    counts the keys a query sees on either side of its own position, its own included: i - j < window (and j - i <
    window where attention is not causal).
    """
    if not causal and window is None:
        return None
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    distance = position - torch.arange(keys, device=device)
    mask = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance.abs() < window
    return mask


def attention_reference(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v. Returns (out [B, T, H, D], log-sum-exp of the scores [B, H, T]).

    k and v may have fewer heads than q, if their number divides it. A row that sees no key gives 0, and -inf for its
    log-sum-exp. `softcap` c replaces each score s by c * tanh(s / c) (Gemma 2, arXiv:2408.00118).
    """
    group = q_BTHD.shape[2] // k_BSHD.shape[2]
    k_BSHD = k_BSHD.repeat_interleave(group, dim=2)
    v_BSHD = v_BSHD.repeat_interleave(group, dim=2)
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD) * scale
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    mask_TS = visible(q_BTHD.shape[1], k_BSHD.shape[1], causal=causal, window=window, device=q_BTHD.device)
    if mask_TS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_TS, float("-inf"))
    lse_BHT = torch.logsumexp(scores_BHTS, dim=-1)
    # exp(-inf - -inf) would be NaN in the rows that see nothing, and so would their gradient.
    finite_BHT = lse_BHT.masked_fill(lse_BHT == float("-inf"), 0.0)
    probabilities_BHTS = torch.exp(scores_BHTS - finite_BHT[..., None])
    return torch.einsum("bhts,bshd->bthd", probabilities_BHTS, v_BSHD), lse_BHT
