"""linear_cross_entropy and linear_log_probs, the public functions: they check arguments and hand them to operators."""

import torch
from torch import Tensor

from kernels.cross_entropy.operators import row_statistics, summed_loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against targets, in nats.

    hidden [..., C]; weight [V, C], kept in any dtype, multiplied in that of hidden; targets [...], int64,
    ignore_index where nothing counts. `softcap` c turns a logit z into c * tanh(z / c); `z_loss` adds z_loss *
    logsumexp(logits)^2 (PaLM, arXiv:2204.02311). reduction: "mean" over the targets that count, "sum", or "none"
    (shape of targets). Returns fp32 (float64 for float64). Raises ValueError naming the argument that does not fit.
    A target beyond the vocabulary is such a ValueError on a CPU; on a GPU, where to look would mean to wait, the kernel
    makes loss and gradients NaN.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    rows, flat = _flat(hidden, weight, targets, softcap)
    # Inside of an operator gradients are always off, so it cannot see whether they will be wanted.
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if wanted and reduction != "none":
        total, _, _ = summed_loss(rows, weight, flat, ignore_index, softcap, z_loss)
    else:
        log_probs, lse, _ = row_statistics(rows, weight, flat, ignore_index, softcap, 1.0, False)
        losses = z_loss * lse.square() - log_probs if z_loss else -log_probs
        if reduction == "none":
            return losses.view(targets.shape)
        total = losses.sum()
    if reduction == "sum":
        return total
    count = (flat != ignore_index).sum()
    # Where nothing counts the mean is NaN, as in F.cross_entropy, but the gradients are 0.
    return (total / count.clamp(min=1)).masked_fill(count == 0, float("nan"))


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) under softmax(logits / temperature), and that distribution's entropy, in nats: both [...].

    logits = hidden @ weight.T, capped by `softcap`; arguments, dtypes and errors as of linear_cross_entropy. Both
    results have gradients (the entropy's is PPO's bonus). Where a target is -100 both are 0, and so are the gradients.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    rows, flat = _flat(hidden, weight, targets, softcap)
    log_probs, _, entropy = row_statistics(rows, weight, flat, -100, softcap, temperature, True)
    return log_probs.view(targets.shape), entropy.view(targets.shape)


def _flat(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """hidden [N, C] and targets [N]. Raises ValueError naming the argument that does not fit."""
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"shapes do not fit: {shapes}; expected [..., C], [V, C], [...]")
    if not hidden.is_floating_point() or targets.dtype != torch.int64:
        raise ValueError(f"hidden is {hidden.dtype} and targets {targets.dtype}; expected a floating dtype and int64")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; expected None or a finite number above 0")
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
