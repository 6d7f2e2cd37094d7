"""The walk over the rows: logits, in fp32, are made a block at a time, turned into what is wanted, and overwritten.

Loss and gradients are taken while a block is at hand (the idea of Cut Cross-Entropy, arXiv:2411.09009, and of Liger
Kernel, arXiv:2410.10989). The products are the library's; a backend does what lies between them.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from kernels.backend import backend
from kernels.cross_entropy import torch_backend
from kernels.cross_entropy.call import Options, Rows, Wide, accumulator
from kernels.scores import linear_scores

# A block of logits wants to stay in cache but be tall enough for an efficient matrix product. Measured on 2 CPU cores:
# 512 rows of 4,096 pieces and 256 rows of 28,000 are fastest; 64 rows are 20% slower, all rows at once twice as slow.
BLOCK_BYTES = 8 * 2**20
SMALLEST_BLOCK = 256
# A GPU has no such cache, but more units to fill, and adds each block's share to the whole [V, C] gradient in memory:
# 1,024 rows of 128k pieces (in fp32, and their gradients in bf16) are as few as hide that behind a product with
# C = 4,096. No more than an eighth of the logits, though: the blocks are to be a small part of the plain peak; but of
# a few logits not so small a part that the launches take longer than the work.
GPU_BLOCK_BYTES = (32 * 2**20, 768 * 2**20)


def summed_loss(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, options: Options, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over rows of z_loss * lse^2 - log p(target), and its gradients by hidden and weight."""
    log_probs, lse = _per_row(hidden_NC), _per_row(hidden_NC)
    rows = Rows(log_probs, lse, None)
    weight = weight_VC.to(hidden_NC.dtype)
    gradients = _Gradients(hidden_NC, weight_VC, weight)
    step = _backend(hidden_NC)
    for block, hidden, targets, logits in _walk(hidden_NC, weight, targets_N, options):
        gradients.add(block, hidden, step.statistics(logits, targets, rows.part(block), options, z_loss, hidden.dtype))
    return (z_loss * lse.square() - log_probs).sum(), *gradients.result()


def row_statistics(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, options: Options, *, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target), log-sum-exp and entropy (empty unless wanted) of each row."""
    log_probs, lse = _per_row(hidden_NC), _per_row(hidden_NC)
    entropy = _per_row(hidden_NC if want_entropy else hidden_NC[:0])
    rows = Rows(log_probs, lse, entropy if want_entropy else None)
    step = _backend(hidden_NC)
    for block, _, targets, logits in _walk(hidden_NC, weight_VC.to(hidden_NC.dtype), targets_N, options):
        step.statistics(logits, targets, rows.part(block), options, None, hidden_NC.dtype)
    return log_probs, lse, entropy


def gradients(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    rows: Rows,
    upstream: Rows,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """By hidden and weight, of the sum of rows * upstream. What is None upstream is 0."""
    counts = targets_N != options.ignore_index
    zero = torch.zeros_like(counts, dtype=accumulator(hidden_NC))
    log_probs, lse, entropy = (
        None if each is None else torch.where(counts, each, zero)
        for each in (upstream.log_probs, upstream.lse, upstream.entropy)
    )
    # The entropy's part is left out where nobody asked for it: it is a pass over the logits.
    upstream = Rows(zero if log_probs is None else log_probs, zero if lse is None else lse, entropy)
    weight = weight_VC.to(hidden_NC.dtype)
    gradients = _Gradients(hidden_NC, weight_VC, weight)
    step = _backend(hidden_NC)
    for block, hidden, targets, logits in _walk(hidden_NC, weight, targets_N, options):
        wide = step.gradient(logits, targets, rows.part(block), upstream.part(block), options, hidden.dtype)
        gradients.add(block, hidden, wide)
    return gradients.result()


def _backend(hidden: Tensor) -> ModuleType:
    if backend(hidden.device) == "torch" or hidden.dtype == torch.float64:
        return torch_backend
    # Imported here: a machine that runs the torch backend needs no Triton.
    from kernels.cross_entropy import triton_backend

    return triton_backend


def _per_row(hidden_NC: Tensor) -> Tensor:
    return torch.empty(hidden_NC.shape[0], dtype=accumulator(hidden_NC), device=hidden_NC.device)


def block_rows(rows: int, vocab: int, element_size: int, *, gpu: bool) -> int:
    """How many of the rows of logits are made at a time, at most."""
    if not gpu:
        return max(SMALLEST_BLOCK, BLOCK_BYTES // (4 * vocab))
    fewest, most = GPU_BLOCK_BYTES
    row_bytes = (element_size if element_size >= 4 else 4 + element_size) * vocab
    fitting = min(most, max(fewest, rows * row_bytes // 8)) // row_bytes
    return max(SMALLEST_BLOCK, fitting // 128 * 128)  # whole tiles of the products


def _walk(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, options: Options
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Block by block: where it stands, its rows of hidden, their targets, their logits (overwritten by the next)."""
    vocab = weight_VC.shape[0]
    if not targets_N.is_cuda:
        wrong = targets_N[(targets_N != options.ignore_index) & ((targets_N < 0) | (targets_N >= vocab))]
        if len(wrong):
            raise ValueError(f"targets holds {int(wrong[0])}; expected 0 to {vocab - 1}, or {options.ignore_index}")
    rows = block_rows(len(hidden_NC), vocab, hidden_NC.element_size(), gpu=hidden_NC.is_cuda)
    # Rows begin at multiples of 16 logits, whatever the vocabulary: a GPU's products need that to be fast.
    padded = -(-vocab // 16) * 16
    dtype = accumulator(hidden_NC)
    buffer = torch.empty(min(rows, len(targets_N)), padded, dtype=dtype, device=hidden_NC.device)[:, :vocab]
    for start in range(0, len(targets_N), rows):
        block = slice(start, min(start + rows, len(targets_N)))
        targets = targets_N[block]
        # 0 * inf is NaN: a row that does not count must not be able to spoil the sums over rows.
        hidden = hidden_NC[block].masked_fill((targets == options.ignore_index)[:, None], 0.0)
        yield block, hidden, targets, linear_scores(hidden, weight_VC, out=buffer[: len(targets)])


class _Gradients:
    """By hidden and by weight, added up block by block: the latter in fp32 where hidden is shorter."""

    def __init__(self, hidden_NC: Tensor, weight_VC: Tensor, weight: Tensor) -> None:
        self.weight, self.dtype = weight, weight_VC.dtype
        self.by_hidden = torch.empty(hidden_NC.shape, dtype=hidden_NC.dtype, device=hidden_NC.device)
        self.by_weight = torch.zeros(weight.shape, dtype=accumulator(hidden_NC), device=weight.device)

    def add(self, block: slice, hidden: Tensor, wide: Wide) -> None:
        if wide.factor is None or wide.one_hot is None or wide.targets is None:
            torch.mm(wide.matrix, self.weight, out=self.by_hidden[block])
            self._add_to_weight(wide.matrix.T, hidden)
            return
        factor, one_hot = wide.factor[:, None], wide.one_hot[:, None]
        self.by_hidden[block] = torch.mm(wide.matrix, self.weight) * factor + self.weight[wide.targets] * one_hot
        self._add_to_weight(wide.matrix.T, (hidden * factor).to(hidden.dtype))
        self.by_weight.index_add_(0, wide.targets, (hidden * one_hot).to(self.by_weight.dtype))

    def _add_to_weight(self, wide: Tensor, narrow: Tensor) -> None:
        if wide.dtype == self.by_weight.dtype:
            self.by_weight.addmm_(wide, narrow)
        elif wide.is_cuda:
            # Added up by the product itself: a bf16 share of its own would be rounded, written and read again.
            torch.addmm(self.by_weight, wide, narrow, out_dtype=self.by_weight.dtype, out=self.by_weight)
        else:
            self.by_weight += torch.mm(wide, narrow)

    def result(self) -> tuple[Tensor, Tensor]:
        return self.by_hidden, self.by_weight.to(self.dtype)
