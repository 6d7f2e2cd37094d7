"""One block of logits in PyTorch: what is known of its rows, and the gradient. Any dtype; the records of both backends.

Each step overwrites the block, so that it stays in the cache of a CPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """logits = cap(hidden @ weight.T) / temperature; rows whose target is ignore_index do not count."""

    ignore_index: int
    softcap: float | None
    temperature: float = 1.0


class Rows(NamedTuple):
    """Values of each row [N], or the gradients by them. They are 0 where a row does not count."""

    log_probs: Tensor | None  # log p(target)
    lse: Tensor | None  # log-sum-exp of the logits
    entropy: Tensor | None

    def part(self, block: slice) -> "Rows":
        return Rows(*(None if each is None else each[block] for each in self))


class LogitsGradient(NamedTuple):
    """The gradient by a block of logits, [R, V]: factor * matrix + one_hot * [is target], in the dtype of hidden.

    What is the same all along a row can so be multiplied onto the narrow side of a product. Where it is None, the
    matrix has it.
    """

    matrix: Tensor
    factor: Tensor | None = None  # [R]
    one_hot: Tensor | None = None  # [R]
    targets: Tensor | None = None  # [R], 0 where a row does not count


def statistics(
    raw: Tensor, targets: Tensor, rows: Rows, options: Options, z_loss: float | None, dtype: torch.dtype
) -> LogitsGradient | None:
    """Fill in `rows`. With z_loss, return the gradient of the sum of z_loss * lse^2 - log p(target), in `dtype`."""
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
    factor = scale * (1 + 2 * z_loss * lse) / total
    return _chained(LogitsGradient(exponentials, factor, -scale, targets), capped, dtype, options)


def gradient(
    raw: Tensor, targets: Tensor, rows: Rows, upstream: Rows, options: Options, dtype: torch.dtype
) -> LogitsGradient:
    """Return the gradient by the logits, in `dtype`, of the sum of rows * upstream."""
    targets = targets.masked_fill(targets == options.ignore_index, 0)
    logits = _logits(raw, options)
    capped = logits.clone() if options.softcap is not None else None
    assert rows.lse is not None and upstream.log_probs is not None and upstream.lse is not None
    log_p = logits.sub_(rows.lse[:, None])
    factor = upstream.lse - upstream.log_probs
    if upstream.entropy is None:
        matrix = log_p.exp_()
    else:
        # d entropy / d logit = -p * (log p + entropy)
        assert rows.entropy is not None
        matrix = log_p.exp()
        matrix.mul_(log_p.add_(rows.entropy[:, None]).mul_(-upstream.entropy[:, None]).add_(factor[:, None]))
        factor = torch.ones_like(factor)
    return _chained(LogitsGradient(matrix, factor, upstream.log_probs, targets), capped, dtype, options)


def _logits(logits: Tensor, options: Options) -> Tensor:
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits.div_(options.temperature) if options.temperature != 1 else logits


def _chained(by_logits: LogitsGradient, capped: Tensor | None, dtype: torch.dtype, options: Options) -> LogitsGradient:
    """Return the gradient by the products, before the cap, whose slope differs by column, and the temperature."""
    matrix, factor, one_hot, targets = by_logits
    assert factor is not None and one_hot is not None and targets is not None
    if capped is not None and options.softcap is not None:
        slope = capped.mul_(options.temperature / options.softcap).square_().neg_().add_(1)
        matrix.mul_(slope)
        one_hot = one_hot * slope.gather(1, targets[:, None])[:, 0]
    return LogitsGradient(matrix.to(dtype), factor / options.temperature, one_hot / options.temperature, targets)
