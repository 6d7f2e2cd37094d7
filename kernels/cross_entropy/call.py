"""What both backends share: the options of a call, what is known of its rows, and a block's gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """logits = cap(hidden @ weight.T) / temperature; rows whose target is ignore_index do not count."""

    ignore_index: int
    softcap: float | None
    temperature: float = 1.0


@dataclass(frozen=True)
class Rows:
    """Of each row [N], or the gradients by it: log p(target), log-sum-exp, entropy. 0 where a row does not count."""

    log_probs: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None

    def part(self, block: slice) -> "Rows":
        return Rows(*(None if each is None else each[block] for each in (self.log_probs, self.lse, self.entropy)))


@dataclass(frozen=True)
class Wide:
    """The gradient by a block of logits, [R, V]: factor * matrix + one_hot * [is target], in the dtype of hidden.

    What is the same all along a row can so be multiplied onto the narrow side of a product. None: it is in the matrix.
    """

    matrix: Tensor
    factor: Tensor | None = None  # [R]
    one_hot: Tensor | None = None  # [R]
    targets: Tensor | None = None  # [R], 0 where a row does not count


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype of sums and of results."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
