"""Linear layer and cross-entropy in one, without ever holding the [tokens, vocab] logits.

The logits are made a block of rows at a time; loss and both gradients are taken while the block is still in cache, and
then it is overwritten (the idea of Cut Cross-Entropy, arXiv:2411.09009, and of Liger Kernel, arXiv:2410.10989).
"""

from typing import Any

import torch
from torch import Tensor

# A block of logits wants to stay in cache but be tall enough for an efficient matrix product. Measured on 2 CPU cores:
# 512 rows of 4,096 pieces and 256 rows of 28,000 are fastest; 64 rows are 20% slower, all rows at once twice as slow.
BLOCK_BYTES = 8 * 2**20
SMALLEST_BLOCK = 256
# A GPU has no such cache, but many more units to fill.
GPU_BLOCK_BYTES = 256 * 2**20


# The loop over blocks would be unrolled by torch.compile, which has nothing to fuse across them.
@torch.compiler.disable
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
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"shapes do not fit: {shapes}; expected [..., C], [V, C], [...]")
    if not hidden.is_floating_point() or targets.dtype != torch.int64:
        raise ValueError(f"hidden is {hidden.dtype} and targets {targets.dtype}; expected a floating dtype and int64")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; expected None or a number above 0")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    flat = targets.reshape(-1)
    losses: Tensor = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        flat,
        ignore_index,
        softcap,
        z_loss,
        reduction,
        # Inside `forward` gradients are always off, so it cannot see whether they will be wanted.
        torch.is_grad_enabled(),
    )
    if reduction == "none":
        return losses.reshape(targets.shape)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        targets_N: Tensor,
        ignore_index: int,
        softcap: float | None,
        z_loss: float,
        reduction: str,
        grad_enabled: bool,
    ) -> Tensor:
        counts_N = targets_N != ignore_index
        ctx.reduction, ctx.options = reduction, (softcap, z_loss)
        needs_gradient = grad_enabled and any(ctx.needs_input_grad[:2])
        targets_N = targets_N.masked_fill(~counts_N, 0)
        if reduction == "none":
            # Each row's gradient will be scaled by a number that is not known yet: the backward pass starts over.
            ctx.save_for_backward(hidden_NC, weight_VC, targets_N, counts_N)
            return _blocks(hidden_NC, weight_VC, targets_N, counts_N, None, softcap, z_loss)[0]
        # The gradients of the sum: divided here by the number of rows, they would underflow in fp16.
        scale_N = counts_N.to(_accumulator(hidden_NC)) if needs_gradient else None
        loss_N, *gradients = _blocks(hidden_NC, weight_VC, targets_N, counts_N, scale_N, softcap, z_loss)
        ctx.save_for_backward(counts_N.sum(), *gradients)
        return loss_N.sum() / counts_N.sum() if reduction == "mean" else loss_N.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        if ctx.reduction == "none":
            hidden_NC, weight_VC, targets_N, counts_N = ctx.saved_tensors
            scale_N = grad.masked_fill(~counts_N, 0.0)
            _, hidden_grad, weight_grad = _blocks(hidden_NC, weight_VC, targets_N, counts_N, scale_N, *ctx.options)
        else:
            count, *gradients = ctx.saved_tensors
            # Where nothing counts the mean is NaN, as in F.cross_entropy, but the gradients are 0.
            factor = grad / count.clamp(min=1) if ctx.reduction == "mean" else grad
            hidden_grad, weight_grad = (gradient * factor.to(gradient.dtype) for gradient in gradients)
        return hidden_grad, weight_grad, *[None] * 6


def _blocks(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    counts_N: Tensor,
    scale_N: Tensor | None,
    softcap: float | None,
    z_loss: float,
) -> tuple[Tensor, ...]:
    """Loss of each row [N]; with `scale_N` also the gradients of (scale * loss).sum() by hidden and by weight.

    A row that does not count has loss 0, and scale 0.
    """
    block_bytes = GPU_BLOCK_BYTES if hidden_NC.is_cuda else BLOCK_BYTES
    rows = max(SMALLEST_BLOCK, block_bytes // (4 * weight_VC.shape[0]))
    weight = weight_VC.detach().to(hidden_NC.dtype)
    accumulate = _accumulator(hidden_NC)
    loss_N = torch.empty(hidden_NC.shape[0], dtype=accumulate, device=hidden_NC.device)
    hidden_grad = torch.empty_like(hidden_NC) if scale_N is not None else None
    weight_grad = torch.zeros_like(weight_VC, dtype=accumulate) if scale_N is not None else None
    for start in range(0, hidden_NC.shape[0], rows):
        block = slice(start, start + rows)
        # 0 * inf is NaN: a row that does not count must not be able to spoil the sums over rows.
        hidden, targets = hidden_NC[block].detach().masked_fill(~counts_N[block, None], 0.0), targets_N[block]
        logits = torch.mm(hidden, weight.T).to(accumulate)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        target_logit = logits.gather(1, targets[:, None])[:, 0]
        highest = logits.amax(dim=1)
        capped = logits.clone() if softcap is not None and scale_N is not None else None
        exponentials = logits.sub_(highest[:, None]).exp_()
        total = exponentials.sum(dim=1)
        lse = highest + total.log()
        loss_N[block] = (lse - target_logit + z_loss * lse * lse).masked_fill(~counts_N[block], 0.0)
        if scale_N is None or hidden_grad is None or weight_grad is None:
            continue
        # d loss / d logit = probability * (1 + 2 z lse) - [is target]. The division by `total` and the scale go onto
        # the narrow side of each product, and the one-hot part is a row lookup: the wide block is not touched again.
        scale = scale_N[block]
        row_factor = (scale * (1 + 2 * z_loss * lse) / total)[:, None]
        one_hot = scale[:, None]
        if capped is not None and softcap is not None:
            # The cap's own slope differs by column: here the wide block does carry the whole gradient.
            exponentials.mul_(row_factor).scatter_add_(1, targets[:, None], -one_hot)
            exponentials.mul_(capped.div_(softcap).square_().neg_().add_(1))
            row_factor, one_hot = torch.ones_like(row_factor), torch.zeros_like(one_hot)
        wide = exponentials.to(hidden.dtype)
        hidden_grad[block] = torch.mm(wide, weight) * row_factor - weight[targets] * one_hot
        narrow = (hidden * row_factor).to(hidden.dtype)
        if wide.dtype == accumulate:
            weight_grad.addmm_(wide.T, narrow)
        else:
            weight_grad += torch.mm(wide.T, narrow)
        weight_grad.index_add_(0, targets, (hidden * -one_hot).to(accumulate))
    if hidden_grad is None or weight_grad is None:
        return (loss_N,)
    return loss_N, hidden_grad, weight_grad.to(weight_VC.dtype)


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.float32 if hidden.dtype in (torch.float16, torch.bfloat16) else hidden.dtype
