"""The last layer's product, whose results are not rounded to the dtype of what is multiplied."""

import torch
from torch import Tensor


def linear_scores(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """hidden @ weight.T, in fp32 where hidden is bf16 or fp16: the scores of every piece as the next token.

    Rounded to bf16 the best two often tie, and log-probabilities are off by some hundredths. hidden [..., C]; weight
    [V, C], kept in any dtype, multiplied in that of hidden; out [N, V], for hidden [N, C]. Returns [..., V]. Gradients
    flow where out is None.
    """
    rows, weight = hidden.reshape(-1, hidden.shape[-1]), weight.to(hidden.dtype)
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        scores = torch.mm(rows, weight.T, out=out)
    elif hidden.is_cuda and not torch.is_grad_enabled():  # PyTorch has no gradient of this product
        scores = torch.mm(rows, weight.T, out_dtype=torch.float32, out=out)
    elif hidden.dtype == torch.bfloat16 and not hidden.is_cuda:
        # A CPU has no such product, but its sums are fp32 inside: taken once more, less what they were rounded to,
        # they leave what rounding took. Two bf16 products take no longer than one in fp32, and no copy of the weights.
        minus = torch.mm(rows, weight.T).neg_()
        rest = torch.addmm(minus, rows, weight.T)
        scores = (rest.float() if out is None else out.copy_(rest)).sub_(minus)
    else:
        scores = torch.mm(rows.float(), weight.T.float(), out=out)
    return scores.view(*hidden.shape[:-1], -1)
