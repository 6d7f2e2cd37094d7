"""The start of every Triton kernel here: two decorators, the launch, tanh, and a probe that shows whether kernels run.

`@kernel` marks a function that is launched, `@jit` one that kernels call.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

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
            "tokens", "queries", "keys", "window", "splits", "rows", "programs", "stride_table_batch",
        ],
        do_not_specialize_on_alignment=["cu_q_ptr", "cu_k_ptr", "d_lse_ptr", "lengths_ptr", "table_ptr", "targets_ptr"],
    )  # fmt: skip
# Of each kernel with its constants so many ways to call it are remembered, then all are forgotten.
MOST_REMEMBERED = 1024

__all__ = ["Launch", "jit", "kernel", "probe", "tanh"]


class Launch:
    """A kernel with its constants, to be launched again and again.

    A kernel's arguments are tensors, then integers for whose values Triton may compile it anew (`fixed`), then other
    numbers, then constants. Triton looks at each of them at each launch, which takes longer than many a kernel runs.
    Here one look at all of them finds the kernel that Triton compiled for such arguments: a key that holds no less
    than Triton's own, since it has the values of `fixed`, where Triton's has what is known of these values.
    """

    def __init__(self, function: Any, **constants: Any) -> None:
        self.function, self.constants, self.scratch = function, constants, constants.get("DESCRIPTOR", False)
        self.last = [constants[name] for name in function.arg_names if name in constants]
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], tensors: tuple[Tensor | None, ...], fixed: tuple[int, ...],
        numbers: tuple[float, ...] = (),
    ) -> None:  # fmt: skip
        """Launch it on the device of the first tensor, since Triton itself launches on the current one."""
        index = tensors[0].get_device()  # type: ignore[union-attr]
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self(grid, tensors, fixed, numbers)
            return
        if self.scratch:
            # Descriptors are made on the device and live in memory that Triton asks for. The setting is the thread's
            # own, and autograd has threads of its own: set it at every launch.
            triton.set_allocator(_scratch)
        # A tensor begins at a multiple of 16 or not.
        about = [None if each is None else (each.dtype, each.data_ptr() % 16) for each in tensors]
        key = (index, fixed, *map(type, numbers), *about)
        # With these settings Triton compiles anew, and for integers of more than 32 bits.
        usual = max(numbers, default=0) < 2**31 and not (knobs.runtime.debug or knobs.compilation.instrumentation_mode)
        if usual and (compiled := self.compiled.get(key)) is not None:
            arguments = (*tensors, *fixed, *numbers, *self.last)
            if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:  # a profiler's
                compiled[grid](*arguments)
            else:  # what that does, in a third of the time
                driver = triton.runtime.driver.active
                stream = driver.get_current_stream(driver.get_current_device())
                run, about = compiled.run, compiled.packed_metadata
                run(*grid, stream, compiled.function, about, None, None, None, *arguments)
            return
        compiled = self.function[grid](*tensors, *fixed, *numbers, **self.constants)
        # Interpreted, or compiled in the background, it is no such kernel.
        if usual and isinstance(compiled, CompiledKernel):
            if len(self.compiled) >= MOST_REMEMBERED:
                self.compiled.clear()
            self.compiled[key] = compiled


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


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
    Launch(double_kernel, BLOCK=16)((1, 1, 1), (x,), ())
    return None if bool((x == 2).all()) else "a probe kernel gave a wrong answer"
