"""silu_mul, what a gated MLP has between its two matrices: the public function, its checks, and the torch backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import backend, recomputed


def silu_mul(x: Tensor) -> Tensor:
    """Return silu(x[..., :M]) * x[..., M:], SwiGLU without its matrices (Shazeer 2020, 2002.05202).

    x [..., 2 M] of any floating dtype; the result is [..., M] in that dtype. It keeps x for its gradient, no more. The
    Triton kernels compute in fp32 between reading and writing. Raises ValueError where x does not fit.
    """
    if x.ndim == 0 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected a floating dtype and [..., an even width]")
    if backend(x.device) == "torch" or x.dtype == torch.float64:
        return _plain(x)
    # Imported here: a machine that runs the torch backend needs no Triton.
    from kernels.silu_mul_triton import run_silu_mul

    return run_silu_mul(x)  # type: ignore[no-any-return]


@recomputed
def _plain(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
