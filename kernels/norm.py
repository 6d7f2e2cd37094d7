"""layer_norm and rms_norm: the public functions, their checks, and the torch backend."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import backend, direct, save_inputs

WIDEST = 16384  # what the Triton kernels take, which hold whole rows in registers


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016, 1607.06450).

    x [..., N] of any floating dtype; weight, bias [N], which may be kept in another one. With `residual` (shape and
    dtype of x), x + residual, rounded to that dtype, is what is normalised, and it is returned as well:
    (normalised, x + residual).

    Results have the dtype of x; sums are fp32 at least. Raises ValueError naming the argument that does not fit.
    """
    return _norm(x, weight, bias, residual, eps, True)


def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """Return x / sqrt(mean(x ** 2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, 1910.07467).

    Shapes, dtypes, `residual` and errors are those of layer_norm. It keeps what it normalised for the gradient alone.
    """
    return _norm(x, weight, None, residual, eps, False)


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, centred: bool
) -> Tensor | tuple[Tensor, Tensor]:
    _check(x, weight, bias, residual, eps)
    if backend(x.device) == "torch" or x.dtype == torch.float64:
        summed = x if residual is None else x + residual
        if centred or torch.compiler.is_compiling():
            y = _normalise(summed, weight, bias, eps, centred)
        else:
            y = _rms_normalise(eps)(summed, weight)
    else:
        # Imported here: a machine that runs the torch backend needs no Triton.
        from kernels.norm_triton import run_norm

        if not 1 <= x.shape[-1] <= WIDEST:
            raise ValueError(f"x is {x.shape[-1]} wide; expected 1 to {WIDEST} (GPT_KERNELS=torch takes any)")
        y, summed, _ = run_norm(x, residual, weight, bias, eps, centred)
    return y if residual is None else (y, summed)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    # On the CPU PyTorch adds up the gradients of weight and bias in the dtype of x. A bf16 sum stops growing at 256
    # times what is added: of 4,096 rows that all pull one way a thread keeps 256, and of more rows no more.
    wide = torch.float32 if x.device.type == "cpu" and x.element_size() < 4 else x.dtype
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    if centred:
        return F.layer_norm(x.to(wide), weight.shape, weight, bias, eps).to(x.dtype)
    return F.rms_norm(x.to(wide), weight.shape, weight, eps).to(x.dtype)


@cache
def _rms_normalise(eps: float) -> Callable[..., Tensor]:
    # PyTorch has no RMSNorm in one piece on a CPU: it would keep two copies of x in fp32, and its gradient is slow.
    normalise = partial(_normalise, bias=None, eps=eps, centred=False)
    run: Callable[..., Tensor] = direct(normalise, normalise, save_inputs, partial(_rms_gradient, eps=eps))
    return run


def _rms_gradient(ctx: Any, upstream: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, upstream, size = x.to(wide), upstream.to(wide), x.shape[-1]
    scale = torch.linalg.vecdot(rows, rows).div_(size).add_(eps).rsqrt_()[..., None]
    normalised, inner = rows * scale, upstream * weight
    of_weight = (upstream * normalised).flatten(0, -2).sum(0)
    along = torch.linalg.vecdot(inner, normalised).div_(size)[..., None]
    of_x = torch.addcmul(inner, normalised, along, value=-1).mul_(scale)
    return of_x.to(x.dtype), of_weight.to(weight.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float) -> None:
    shape, device = x.shape, x.device
    if not shape or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(shape)}; expected a floating dtype and [..., width]")
    width = shape[-1:]
    for name, tensor, expected in (("weight", weight, width), ("bias", bias, width), ("residual", residual, shape)):
        if tensor is None:
            continue
        if tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(expected)}, to fit x")
        if not (tensor.is_floating_point() and tensor.device == device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; expected a floating dtype on {device}")
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"residual is {residual.dtype}; expected the dtype of x, {x.dtype}")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected 0 or more")
