"""One block of logits by the Triton kernel: one launch."""

import triton
from torch import Tensor

from kernels.cross_entropy.call import Options, Rows, Wide
from kernels.cross_entropy.kernel import rows_kernel


def tile(vocab: int) -> tuple[int, int]:
    """Logits per step, and warps.

    A thread takes 16 logits in a step: two loads of 16 bytes in flight, where they are bf16. More warps for longer
    rows, so that fewer rows are on their way at a time: 2,048 threads a multiprocessor, on 132 of them, hold 17 MB of
    rows of 8k pieces, 34 MB of 32k and 68 MB of 128k (34 MB where registers leave room for one row of the two), and
    what the 50 MB of an H200's L2 hold between the two sweeps is not read again.
    """
    warps = 8 if vocab <= 8192 else 16 if vocab <= 32768 else 32
    return min(512 * warps, triton.next_power_of_2(vocab)), warps


def statistics(raw: Tensor, targets: Tensor, rows: Rows, options: Options, z_loss: float | None) -> Wide | None:
    """As torch_backend."""
    nothing = Rows(None, None, None)
    _launch(raw, targets, rows, nothing, options, z_loss or 0.0, STATISTICS=True, GRADIENT=z_loss is not None,
            ENTROPY=rows.entropy is not None)  # fmt: skip
    return None if z_loss is None else Wide(raw)


def gradient(raw: Tensor, targets: Tensor, rows: Rows, upstream: Rows, options: Options) -> Wide:
    """As torch_backend."""
    _launch(raw, targets, rows, upstream, options, 0.0, STATISTICS=False, GRADIENT=True,
            ENTROPY=upstream.entropy is not None)  # fmt: skip
    return Wide(raw)


def _launch(
    raw: Tensor, targets: Tensor, rows: Rows, upstream: Rows, options: Options, z_loss: float, **switches: bool
) -> None:
    vocab = raw.shape[1]
    size, warps = tile(vocab)
    rows_kernel[(len(targets),)](
        raw, targets.contiguous(), rows.log_probs, rows.lse, rows.entropy,
        upstream.log_probs, upstream.lse, upstream.entropy,
        vocab, raw.stride(0), options.ignore_index, z_loss, options.softcap or 0.0, 1 / options.temperature,
        SOFTCAP=options.softcap is not None, BLOCK_V=size, num_warps=warps, **switches,
    )  # fmt: skip
