"""The losses over whole logits, in plain PyTorch: what linear_cross_entropy and linear_log_probs are compared with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def logits_of(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    logits = logits_of(hidden, weight, softcap)
    flat = logits.reshape(-1, logits.shape[-1])
    losses = F.cross_entropy(flat, targets.reshape(-1), ignore_index=ignore_index, reduction="none")
    counts = targets.reshape(-1) != ignore_index
    losses = losses + z_loss * torch.where(counts, flat.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return losses.reshape(targets.shape)
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


def log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, softcap: float | None = None
) -> Tensor:
    """Both results side by side, [..., 2]."""
    log_p = (logits_of(hidden, weight, softcap) / temperature).log_softmax(-1)
    chosen = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    both = torch.stack((chosen, -(log_p.exp() * log_p).sum(-1)), dim=-1)
    return torch.where((targets != -100)[..., None], both, 0.0)


def problem(
    rows: int = 37, width: int = 12, vocab: int = 29, ignore_index: int = -100, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width)
    targets = torch.randint(vocab, (rows,))
    targets[::5] = ignore_index
    return hidden.to(device), weight.to(device), targets.to(device)


def with_gradients(function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> list[Tensor]:
    """What the function gives, and the gradients by hidden and weight of a weighted sum of it."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(hidden, weight, targets, **options)
    direction = torch.linspace(1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, (hidden, weight), direction)]
