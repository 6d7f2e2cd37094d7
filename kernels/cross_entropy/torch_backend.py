"""One block of logits in PyTorch: any dtype. Each step overwrites the block, which is to stay in cache."""

import torch
from torch import Tensor

from kernels.cross_entropy.call import Options, Rows, Wide


def statistics(
    raw: Tensor, targets: Tensor, rows: Rows, options: Options, z_loss: float | None, dtype: torch.dtype
) -> Wide | None:
    """Fills in `rows`. With z_loss also the gradient, in `dtype`, of the sum of z_loss * lse^2 - log p(target)."""
    counts = targets != options.ignore_index
    targets = targets.masked_fill(~counts, 0)
    logits = _logits(raw, options)
    capped = logits.clone() if z_loss is not None and options.softcap is not None else None
    highest = logits.amax(dim=1)
    target = logits.gather(1, targets[:, None])[:, 0] - highest
    shifted = logits.sub_(highest[:, None])
    exponentials = shifted.exp_() if rows.entropy is None else shifted.exp()
    total = exponentials.sum(dim=1)
    log_total = total.log()
    lse = highest + log_total
    assert rows.log_probs is not None and rows.lse is not None
    rows.log_probs.copy_((target - log_total).masked_fill(~counts, 0.0))
    rows.lse.copy_(lse.masked_fill(~counts, 0.0))
    if rows.entropy is not None:
        mean = torch.linalg.vecdot(exponentials, shifted) / total
        rows.entropy.copy_((log_total - mean).masked_fill(~counts, 0.0))
    if z_loss is None:
        return None
    scale = counts.to(lse.dtype)
    return _wide(exponentials, scale * (1 + 2 * z_loss * lse) / total, -scale, targets, capped, dtype, options)


def gradient(raw: Tensor, targets: Tensor, rows: Rows, upstream: Rows, options: Options, dtype: torch.dtype) -> Wide:
    """Of the sum of rows * upstream, by the logits, in `dtype`."""
    targets = targets.masked_fill(targets == options.ignore_index, 0)
    logits = _logits(raw, options)
    capped = logits.clone() if options.softcap is not None else None
    assert rows.lse is not None and upstream.log_probs is not None and upstream.lse is not None
    log_p = logits.sub_(rows.lse[:, None])
    factor = upstream.lse - upstream.log_probs
    if upstream.entropy is None:
        wide = log_p.exp_()
    else:
        # d entropy / d logit = -p * (log p + entropy)
        assert rows.entropy is not None
        wide = log_p.exp()
        wide.mul_(log_p.add_(rows.entropy[:, None]).mul_(-upstream.entropy[:, None]).add_(factor[:, None]))
        factor = torch.ones_like(factor)
    return _wide(wide, factor, upstream.log_probs, targets, capped, dtype, options)


def _logits(logits: Tensor, options: Options) -> Tensor:
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits.div_(options.temperature) if options.temperature != 1 else logits


def _wide(
    wide: Tensor,
    factor: Tensor,
    one_hot: Tensor,
    targets: Tensor,
    capped: Tensor | None,
    dtype: torch.dtype,
    options: Options,
) -> Wide:
    """Through the cap, whose slope differs by column, and the temperature."""
    if capped is not None and options.softcap is not None:
        slope = capped.mul_(options.temperature / options.softcap).square_().neg_().add_(1)
        wide.mul_(slope)
        one_hot = one_hot * slope.gather(1, targets[:, None])[:, 0]
    return Wide(wide.to(dtype), factor / options.temperature, one_hot / options.temperature, targets)
