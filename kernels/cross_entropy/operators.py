"""The work as torch.library operators, for either backend: with shapes for torch.compile, and with gradients."""

from typing import Any, Optional

import torch
from torch import Tensor

from kernels.cross_entropy import blocks
from kernels.cross_entropy.call import Options, Rows, accumulator


@torch.library.custom_op("gpt::summed_loss", mutates_args=())
def summed_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    softcap: Optional[float],  # noqa: UP045 - the schema is read from these annotations, by every version of torch
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the rows' losses, and its gradients by hidden and weight, taken while the logits are at hand."""
    return blocks.summed_loss(hidden, weight, targets, Options(ignore_index, softcap), z_loss)


@summed_loss.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=accumulator(hidden))
    return loss, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


@torch.autograd.function.once_differentiable
def _scale_gradients(ctx: Any, d_loss: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 6
    # In place where nobody will ask again: a second [V, C] could be the peak of memory. What torch.compile traces is no
    # plain Tensor, and must not be overwritten.
    again = torch._C._autograd._get_current_graph_task_keep_graph() or type(d_loss) is not Tensor
    scale = torch.mul if again else Tensor.mul_
    return *(scale(gradient, d_loss) for gradient in ctx.saved_tensors), *[None] * 4


summed_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("gpt::row_statistics", mutates_args=())
def row_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    softcap: Optional[float],  # noqa: UP045
    temperature: float,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target), log-sum-exp and entropy (empty unless wanted) of each row [N]; 0 where it does not count."""
    options = Options(ignore_index, softcap, temperature)
    return blocks.row_statistics(hidden, weight, targets, options, want_entropy=want_entropy)


@row_statistics.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    log_probs, lse = (hidden.new_empty(targets.shape, dtype=accumulator(hidden)) for _ in range(2))
    want_entropy = options[-1]
    return log_probs, lse, lse.new_empty(targets.shape if want_entropy else 0)


@torch.library.custom_op("gpt::row_statistics_backward", mutates_args=())
def row_statistics_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_log_probs: Optional[Tensor],  # noqa: UP045
    d_lse: Optional[Tensor],  # noqa: UP045
    d_entropy: Optional[Tensor],  # noqa: UP045
    ignore_index: int,
    softcap: Optional[float],  # noqa: UP045
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The gradients by hidden and weight: the logits are made a second time."""
    options = Options(ignore_index, softcap, temperature)
    rows, upstream = Rows(None, lse, entropy), Rows(d_log_probs, d_lse, d_entropy)
    return blocks.gradients(hidden, weight, targets, rows, upstream, options)


@row_statistics_backward.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, *options, want_entropy = inputs
    _, lse, entropy = output
    ctx.set_materialize_grads(False)
    if not want_entropy:
        ctx.mark_non_differentiable(entropy)
    ctx.save_for_backward(hidden, weight, targets, lse, entropy)
    ctx.options = options


def _again(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    return *row_statistics_backward(*ctx.saved_tensors, *upstream, *ctx.options), *[None] * 5


row_statistics.register_autograd(_again, setup_context=_keep_rows)
