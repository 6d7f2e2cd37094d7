"""One block of logits by the Triton kernel: one launch."""

import torch
import triton
from torch import Tensor

from kernels.cross_entropy.call import Options, Rows, Wide
from kernels.cross_entropy.kernel import rows_kernel


def tile(vocab: int) -> tuple[int, int]:
    """Logits per step, and warps.

    A thread takes 16 logits in a step: four loads of 16 bytes in flight. That takes up to 64
    registers, so that a multiprocessor has room for about 1,024 threads. More warps for longer rows, then, make for
    fewer rows at a time: 4, 2 or 1 on each of an H200's 132, at most 17, 34 and 68 MB of up to 8k, 32k and 128k fp32
    logits. That fits its L2 of 50 MB, from which the second sweep reads them, but for the longest.
    """
    warps = 8 if vocab <= 8192 else 16 if vocab <= 32768 else 32
    return min(512 * warps, triton.next_power_of_2(vocab)), warps


def statistics(
    raw: Tensor, targets: Tensor, rows: Rows, options: Options, z_loss: float | None, dtype: torch.dtype = torch.float32
) -> Wide | None:
    """As torch_backend."""
    nothing, wide = Rows(None, None, None), None if z_loss is None else _wide(raw, dtype)
    _launch(raw, wide, targets, rows, nothing, options, z_loss or 0.0, STATISTICS=True,
            ENTROPY=rows.entropy is not None)  # fmt: skip
    return None if wide is None else Wide(wide)


def gradient(raw: Tensor, targets: Tensor, rows: Rows, upstream: Rows, options: Options, dtype: torch.dtype) -> Wide:
    """As torch_backend."""
    wide = _wide(raw, dtype)
    _launch(raw, wide, targets, rows, upstream, options, 0.0, STATISTICS=False,
            ENTROPY=upstream.entropy is not None)  # fmt: skip
    return Wide(wide)


def _wide(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the gradient, with the strides of the logits: their own where the dtype is the same."""
    if raw.dtype == dtype:
        return raw
    return torch.empty(len(raw), raw.stride(0), dtype=dtype, device=raw.device)[:, : raw.shape[1]]


def _launch(
    raw: Tensor,
    wide: Tensor | None,
    targets: Tensor,
    rows: Rows,
    upstream: Rows,
    options: Options,
    z_loss: float,
    **switches: bool,
) -> None:
    vocab = raw.shape[1]
    size, warps = tile(vocab)
    rows_kernel[(len(targets),)](
        raw, raw if wide is None else wide, targets.contiguous(), rows.log_probs, rows.lse, rows.entropy,
        upstream.log_probs, upstream.lse, upstream.entropy,
        vocab, raw.stride(0), options.ignore_index, z_loss, options.softcap or 0.0, 1 / options.temperature,
        GRADIENT=wide is not None, SOFTCAP=options.softcap is not None, BLOCK_V=size, num_warps=warps, **switches,
    )  # fmt: skip
