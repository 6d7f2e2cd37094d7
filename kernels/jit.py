"""The start of every Triton kernel here: two decorators, tanh, and a probe that shows whether kernels run at all.

`@kernel` marks a function that is launched, `@jit` one that kernels call.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    # A kernel is written in Triton's language, whose types are not Python's. mypy skips the bodies of functions that
    # are marked so, and nothing else of their files.
    from typing import no_type_check as jit
    from typing import no_type_check as kernel
else:
    jit = triton.jit
    # Triton compiles a kernel anew where an integer becomes 1, or a multiple of 16, and where a tensor begins at one.
    # What is named here changes so from call to call: lengths, strides that are lengths, and tensors that may be a part
    # of a longer one. One kernel must do for all of their values. A stride of anything else is a multiple of 16 in most
    # models, and a kernel that knows it reads 16 bytes at a time.
    kernel = triton.jit(
        do_not_specialize=[
            "queries", "keys", "window", "splits", "rows", "programs",
            "stride_lse_batch", "stride_lse_head", "stride_table_batch",
        ],
        do_not_specialize_on_alignment=["cu_q_ptr", "cu_k_ptr", "d_lse_ptr", "lengths_ptr", "table_ptr", "targets_ptr"],
    )  # fmt: skip

__all__ = ["jit", "kernel", "probe", "tanh"]


@jit
def tanh(x):
    """Return tanh to the last bits. Near 0, where 1 - 2 / (1 + exp(2x)) would cancel, it is Cephes' polynomial."""
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = (series * z - 5.37397155531e-2) * z + 1.33314422036e-1
    series = (series * z - 3.33332819422e-1) * z * x + x
    return tl.where(z < 0.390625, series, 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268)))


@kernel
def double_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, 2.0 * tl.load(x_ptr + offsets))


def probe(device: torch.device) -> str | None:
    """Launch a kernel on the device. Return None where its answer is right, else what was wrong."""
    x = torch.ones(16, device=device)
    double_kernel[(1,)](x, BLOCK=16)
    return None if bool((x == 2).all()) else "a probe kernel gave a wrong answer"
