"""One block of logits in PyTorch, in any dtype: what is known of its rows, and the gradient. The records are shared.

Every operation overwrites the block, so that it stays in the cache of a CPU.
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
    lse: Tensor  # log-sum-exp of the logits
    entropy: Tensor | None

    def part(self, block: slice) -> "Rows":
        log_probs, entropy = (None if each is None else each[block] for each in (self.log_probs, self.entropy))
        return Rows(log_probs, self.lse[block], entropy)


class LogitsGradient(NamedTuple):
    """The gradient by a block of logits, [R, V]: factor * matrix + one_hot * [is target], in the dtype of hidden.

    So what is the same all along a row is multiplied onto the narrow side of a product. None: the matrix has it.
    """

    matrix: Tensor
    factor: Tensor | None = None  # [R]
    one_hot: Tensor | None = None  # [R]
    targets: Tensor | None = None  # [R], 0 where a row does not count


def step(
    raw: Tensor, targets: Tensor, rows: Rows, upstream: Rows | None, options: Options, z_loss: float | None,
    dtype: torch.dtype,
) -> LogitsGradient | None:  # fmt: skip
    """Take a block of products hidden @ weight.T, which is overwritten.

    With upstream, return the gradient by the products of the sum of rows * upstream. Else fill in `rows`; with z_loss,
    also return the gradient of the sum of z_loss * lse^2 - log p(target). Gradients are in `dtype`.
    """
    counts = targets != options.ignore_index
    targets = targets.masked_fill(~counts, 0)
    logits = raw
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    if options.temperature != 1:
        logits.div_(options.temperature)
    wanted = upstream is not None or z_loss is not None
    capped = logits.clone() if wanted and options.softcap is not None else None
    if upstream is not None:
        matrix, factor, one_hot = _gradient(logits, rows, upstream)
    else:
        matrix, total, lse = _statistics(logits, counts, targets, rows)
        if z_loss is None:
            return None
        scale = counts.to(lse.dtype)
        factor, one_hot = scale * (1 + 2 * z_loss * lse) / total, -scale
    if capped is not None and options.softcap is not None:
        # The slope of the cap differs by column: it goes into the matrix.
        slope = capped.mul_(options.temperature / options.softcap).square_().neg_().add_(1)
        matrix.mul_(slope)
        one_hot = one_hot * slope.gather(1, targets[:, None])[:, 0]
    return LogitsGradient(matrix.to(dtype), factor / options.temperature, one_hot / options.temperature, targets)


def _statistics(logits: Tensor, counts: Tensor, targets: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Fill in `rows`. Return exp(logits - the highest of the row), the sum of that, and the log-sum-exp."""
    highest = logits.amax(dim=1)
    target = logits.gather(1, targets[:, None])[:, 0] - highest
    shifted = logits.sub_(highest[:, None])
    exponentials = shifted.exp_() if rows.entropy is None else shifted.exp()
    total = exponentials.sum(dim=1)
    log_total = total.log()
    lse = highest + log_total
    assert rows.log_probs is not None
    rows.log_probs.copy_((target - log_total).masked_fill(~counts, 0.0))
    rows.lse.copy_(lse.masked_fill(~counts, 0.0))
    if rows.entropy is not None:
        mean = torch.linalg.vecdot(exponentials, shifted) / total
        rows.entropy.copy_((log_total - mean).masked_fill(~counts, 0.0))
    return exponentials, total, lse


def _gradient(logits: Tensor, rows: Rows, upstream: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return matrix, factor and one_hot of a LogitsGradient."""
    assert upstream.log_probs is not None
    log_p = logits.sub_(rows.lse[:, None])
    factor = upstream.lse - upstream.log_probs
    if upstream.entropy is None:
        return log_p.exp_(), factor, upstream.log_probs
    # d entropy / d logit = -p * (log p + entropy)
    assert rows.entropy is not None
    matrix = log_p.exp()
    matrix.mul_(log_p.add_(rows.entropy[:, None]).mul_(-upstream.entropy[:, None]).add_(factor[:, None]))
    return matrix, torch.ones_like(factor), upstream.log_probs
