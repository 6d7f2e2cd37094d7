"""A linear layer and cross-entropy in one, without ever holding the [tokens, vocab] logits.

linear_cross_entropy and linear_log_probs check their arguments and call operators, which torch.compile and autograd
know. These walk over the rows: logits, in fp32, are made a block at a time, turned into what is wanted, and overwritten
by the next block (the idea of Cut Cross-Entropy, arXiv:2411.09009, and of Liger Kernel, arXiv:2410.10989). PyTorch
makes the products; what lies between them is a step of cross_entropy_torch or cross_entropy_triton.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import cross_entropy_torch
from kernels.backend import backend, direct, wants_gradient
from kernels.cross_entropy_torch import LogitsGradient, Options, Rows

# A block of logits should stay in cache but be tall enough for an efficient matrix product. Measured on 2 CPU cores:
# 512 rows of 4,096 tokens and 256 rows of 28,000 are fastest; 64 rows are 20% slower, all rows at once twice as slow.
BLOCK_BYTES = 8 * 2**20
SMALLEST_BLOCK = 256
# A GPU has no such cache, but more units to fill, and adds each block's share to the whole [V, C] gradient in memory:
# 1,024 rows of 128k tokens (in fp32, and their gradients in bf16) are as few as hide that behind a product with C =
# 4,096. A block is no more than an eighth of the logits, so that it is a small part of the plain peak of memory; but
# where there are few logits, it is not so small a part that the launches take longer than the work.
GPU_BLOCK_BYTES = (32 * 2**20, 768 * 2**20)
AMX = torch.cpu._is_amx_tile_supported()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *,
    ignore_index: int = -100, softcap: float | None = None, z_loss: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Return the cross-entropy of softmax(hidden @ weight.T) against targets, in nats.

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
    total: Tensor
    # Inside of an operator gradients are always off, so it cannot see whether they will be wanted.
    if reduction != "none" and wants_gradient(hidden, weight):
        total, _, _ = run_summed_loss(rows, weight, flat, ignore_index, softcap, z_loss, weight.requires_grad)
    else:
        log_probs, lse, _ = run_row_statistics(rows, weight, flat, ignore_index, softcap, 1.0, False)
        losses: Tensor = z_loss * lse.square() - log_probs if z_loss else -log_probs
        if reduction == "none":
            return losses.view(targets.shape)
        total = losses.sum()
    if reduction == "sum":
        return total
    count = (flat != ignore_index).sum()
    # Where nothing counts the mean is NaN, as in F.cross_entropy, but the gradients are 0.
    return (total / count.clamp(min=1)).masked_fill(count == 0, float("nan"))


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return log p(target) under softmax(logits / temperature), and that distribution's entropy, in nats: both [...].

    logits = hidden @ weight.T, capped by `softcap`; arguments, dtypes and errors as of linear_cross_entropy. Both
    results have gradients (the entropy's is PPO's bonus). Where a target is -100 both are 0, and so are the gradients.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    rows, flat = _flat(hidden, weight, targets, softcap)
    log_probs, _, entropy = run_row_statistics(rows, weight, flat, -100, softcap, temperature, True)
    return log_probs.view(targets.shape), entropy.view(targets.shape)


def linear_scores(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return hidden @ weight.T, in fp32 where hidden is bf16 or fp16: the score of every token as the next one.

    Were scores rounded to bf16, the best two would often tie, and log-probabilities would be off by some hundredths.
    hidden [..., C]; weight [V, C], kept in any dtype, multiplied in that of hidden; out [N, V], for hidden [N, C].
    Returns [..., V]. Gradients flow where out is None.
    """
    rows, weight = hidden.reshape(-1, hidden.shape[-1]), weight.to(hidden.dtype)
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        scores = torch.mm(rows, weight.T, out=out)
    elif hidden.is_cuda and not torch.is_grad_enabled():  # PyTorch has no gradient of this product
        scores = torch.mm(rows, weight.T, out_dtype=torch.float32, out=out)
    elif hidden.dtype == torch.bfloat16 and not hidden.is_cuda and AMX:
        # A CPU has no such product, but its sums are fp32 inside. The product, minus itself as it was rounded, is what
        # rounding took. By AMX two bf16 products take no longer than one in fp32, and need no copy of the weights.
        minus = torch.mm(rows, weight.T).neg_()
        rest = torch.addmm(minus, rows, weight.T)
        if out is None:
            scores = rest.float().sub_(minus)
        else:
            _add(scores := out.copy_(rest), minus, -1.0)
    else:
        scores = torch.mm(rows.float(), weight.T.float(), out=out)
    return scores.view(*hidden.shape[:-1], -1)


def _add(total: Tensor, share: Tensor, factor: float) -> None:
    """Add factor * share, which is in a shorter dtype, on a CPU.

    PyTorch makes a copy of the share in the longer dtype. A large one is new memory each time, whose first use takes
    longer than the sum: a few rows at a time need none.
    """
    rows = max(1, 2**17 // total.shape[1])
    for some, more in zip(torch.split(total, rows), torch.split(share, rows), strict=True):
        some.add_(more, alpha=factor)


def _flat(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return hidden [N, C] and targets [N]. Raises ValueError naming the argument that does not fit."""
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"shapes do not fit: {shapes}; expected [..., C], [V, C], [...]")
    if not hidden.is_floating_point() or targets.dtype != torch.int64:
        raise ValueError(f"hidden is {hidden.dtype} and targets {targets.dtype}; expected a floating dtype and int64")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; expected None or a finite number above 0")
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)


def summed_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, softcap: float | None, z_loss: float,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the sum over rows of z_loss * lse^2 - log p(target), and its gradients by hidden and weight.

    A weight that does not learn has none: [0].
    """
    log_probs, lse, sums = _per_row(hidden), _per_row(hidden), GradientSums(hidden, weight, learns)
    options = Options(ignore_index, softcap)
    _walk(hidden, sums.weight, targets, Rows(log_probs, lse, None), None, options, z_loss, sums)
    return (z_loss * lse.square() - log_probs).sum(), *sums.result()


def row_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor,
    ignore_index: int, softcap: float | None, temperature: float, want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return log p(target), log-sum-exp and, if wanted, the entropy of each row [N]; 0 where a row does not count."""
    log_probs, lse = _per_row(hidden), _per_row(hidden)
    entropy = _per_row(hidden if want_entropy else hidden[:0])
    rows = Rows(log_probs, lse, entropy if want_entropy else None)
    _walk(hidden, weight.to(hidden.dtype), targets, rows, None, Options(ignore_index, softcap, temperature), None, None)
    return log_probs, lse, entropy


def row_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, entropy: Tensor,
    d_log_probs: Tensor | None, d_lse: Tensor | None, d_entropy: Tensor | None,
    ignore_index: int, softcap: float | None, temperature: float, learns: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of row_statistics by hidden and weight: the logits are made a second time."""
    counts = targets != ignore_index
    zero = torch.zeros_like(counts, dtype=_accumulator(hidden))
    # Where nobody asked for the entropy's part, it is left out: it is a pass over the logits.
    upstream = Rows(
        zero if d_log_probs is None else torch.where(counts, d_log_probs, zero),
        zero if d_lse is None else torch.where(counts, d_lse, zero),
        None if d_entropy is None else torch.where(counts, d_entropy, zero),
    )
    rows, sums = Rows(None, lse, entropy), GradientSums(hidden, weight, learns)
    _walk(hidden, sums.weight, targets, rows, upstream, Options(ignore_index, softcap, temperature), None, sums)
    return sums.result()


def _accumulator(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums and of results."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _per_row(hidden: Tensor) -> Tensor:
    return torch.empty(hidden.shape[0], dtype=_accumulator(hidden), device=hidden.device)


def block_rows(rows: int, vocab: int, element_size: int, *, gpu: bool) -> int:
    """Return how many of the rows of logits are made at a time, at most."""
    if not gpu:
        return max(SMALLEST_BLOCK, BLOCK_BYTES // (4 * vocab))
    fewest, most = GPU_BLOCK_BYTES
    row_bytes = (element_size if element_size >= 4 else 4 + element_size) * vocab
    fitting = min(most, max(fewest, rows * row_bytes // 8)) // row_bytes
    return max(SMALLEST_BLOCK, fitting // 128 * 128)  # whole tiles of the products


def _walk(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor,
    rows: Rows, upstream: Rows | None, options: Options, z_loss: float | None, sums: "GradientSums | None",
) -> None:  # fmt: skip
    """Make the logits block by block, let the backend take its step with each, and add up the gradients in `sums`."""
    vocab, dtype = weight_VC.shape[0], _accumulator(hidden_NC)
    if not targets_N.is_cuda:
        wrong = targets_N[(targets_N != options.ignore_index) & ((targets_N < 0) | (targets_N >= vocab))]
        if len(wrong):
            raise ValueError(f"targets holds {int(wrong[0])}; expected 0 to {vocab - 1}, or {options.ignore_index}")
    if backend(hidden_NC.device) == "torch" or hidden_NC.dtype == torch.float64:
        step = cross_entropy_torch.step
    else:
        # Imported here: a machine that runs the torch backend needs no Triton.
        from kernels.cross_entropy_triton import step
    height = block_rows(len(hidden_NC), vocab, hidden_NC.element_size(), gpu=hidden_NC.is_cuda)
    # Rows begin at multiples of 16 logits, whatever the vocabulary: a GPU's products need that to be fast.
    padded = -(-vocab // 16) * 16
    buffer = torch.empty(min(height, len(targets_N)), padded, dtype=dtype, device=hidden_NC.device)[:, :vocab]
    for start in range(0, len(targets_N), height):
        block = slice(start, min(start + height, len(targets_N)))
        targets = targets_N[block]
        # 0 * inf is NaN: a row that does not count must not be able to spoil the sums over rows.
        hidden = hidden_NC[block].masked_fill((targets == options.ignore_index)[:, None], 0.0)
        logits = linear_scores(hidden, weight_VC, out=buffer[: len(targets)])
        given = None if upstream is None else upstream.part(block)
        by_logits = step(logits, targets, rows.part(block), given, options, z_loss, hidden.dtype)
        if sums is not None and by_logits is not None:
            sums.add(block, hidden, by_logits)


class GradientSums:
    """The gradients by hidden and by weight, added up block by block: the latter in fp32 where hidden is shorter."""

    def __init__(self, hidden_NC: Tensor, weight_VC: Tensor, learns: bool) -> None:
        self.weight, self.dtype, self.learns = weight_VC.to(hidden_NC.dtype), weight_VC.dtype, learns
        self.by_hidden = torch.empty(hidden_NC.shape, dtype=hidden_NC.dtype, device=hidden_NC.device)
        shape = weight_VC.shape if learns else (0,)
        self.by_weight = torch.zeros(shape, dtype=_accumulator(hidden_NC), device=weight_VC.device)

    def add(self, block: slice, hidden: Tensor, by_logits: LogitsGradient) -> None:
        matrix, factor, one_hot, targets = by_logits
        if factor is None or one_hot is None or targets is None:
            torch.mm(matrix, self.weight, out=self.by_hidden[block])
            self._add_to_weight(matrix.T, hidden)
            return
        factor, one_hot = factor[:, None], one_hot[:, None]
        self.by_hidden[block] = torch.mm(matrix, self.weight) * factor + self.weight[targets] * one_hot
        if not self.learns:
            return
        self._add_to_weight(matrix.T, (hidden * factor).to(hidden.dtype))
        self.by_weight.index_add_(0, targets, (hidden * one_hot).to(self.by_weight.dtype))

    def _add_to_weight(self, wide: Tensor, narrow: Tensor) -> None:
        if not self.learns:
            return
        if wide.dtype == self.by_weight.dtype:
            self.by_weight.addmm_(wide, narrow)
        elif wide.is_cuda:
            # Added up by the product itself: a bf16 share of its own would be rounded, written and read again.
            torch.addmm(self.by_weight, wide, narrow, out_dtype=self.by_weight.dtype, out=self.by_weight)
        else:
            _add(self.by_weight, torch.mm(wide, narrow), 1.0)

    def result(self) -> tuple[Tensor, Tensor]:
        return self.by_hidden, self.by_weight.to(self.dtype)


summed_loss_op = torch.library.custom_op("gpt::summed_loss", summed_loss, mutates_args=())
row_statistics_op = torch.library.custom_op("gpt::row_statistics", row_statistics, mutates_args=())
row_gradients_op = torch.library.custom_op("gpt::row_statistics_backward", row_gradients, mutates_args=())


@row_gradients_op.register_fake
def _empty_gradients(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape if rest[-1] else (0,))


@summed_loss_op.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty((), dtype=_accumulator(hidden)), *_empty_gradients(hidden, weight, *rest)


@row_statistics_op.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    want_entropy = options[-1]
    return _per_row(hidden), _per_row(hidden), _per_row(hidden if want_entropy else hidden[:0])


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


@torch.autograd.function.once_differentiable
def _scale_gradients(ctx: Any, d_loss: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 7
    # In place where nobody will ask again: a second [V, C] could be the peak of memory. What torch.compile traces is no
    # plain Tensor, and must not be overwritten.
    again = torch._C._autograd._get_current_graph_task_keep_graph() or type(d_loss) is not Tensor
    scale = torch.mul if again else Tensor.mul_
    return *(scale(gradient, d_loss) for gradient in ctx.saved_tensors), *[None] * 5


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, *options, want_entropy = inputs
    _, lse, entropy = output
    ctx.set_materialize_grads(False)
    if not want_entropy:
        ctx.mark_non_differentiable(entropy)
    ctx.save_for_backward(hidden, weight, targets, lse, entropy)
    ctx.options = options


def _row_gradients(ctx: Any, *upstream: Tensor | None, run: Any = row_gradients_op) -> tuple[Tensor | None, ...]:
    return *run(*ctx.saved_tensors, *upstream, *ctx.options, ctx.needs_input_grad[1]), *[None] * 5


summed_loss_op.register_autograd(_scale_gradients, setup_context=_keep_gradients)
row_statistics_op.register_autograd(_row_gradients, setup_context=_keep_rows)
run_summed_loss = direct(summed_loss_op, summed_loss, _keep_gradients, _scale_gradients, leaves=2)
run_row_statistics = direct(
    row_statistics_op, row_statistics, _keep_rows, partial(_row_gradients, run=row_gradients), leaves=2
)
