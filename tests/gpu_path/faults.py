"""Launches that are wrong on purpose: the GPU that is not there must find each fault."""

import threading
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, amount, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) * factor + amount)


@triton.jit
def descriptor_kernel(x_ptr, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    matrix = tl.make_tensor_descriptor(x_ptr, [rows, BLOCK], [BLOCK, 1], [BLOCK, BLOCK])
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.sum(matrix.load([0, 0]), 0))


class Moving(torch.Tensor):
    """A tensor that lies elsewhere whenever it is asked."""

    moves = 0
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def data_ptr(self) -> int:
        self.moves += 1
        return super().data_ptr() + 16 * self.moves


def numbers() -> torch.Tensor:
    return torch.zeros(64, device="cuda")


def compiled(x: torch.Tensor, amount: float) -> None:
    """Hand these to a kernel that was compiled for a multiple of 16 and an aligned tensor."""
    kernel = add_kernel[(1,)](numbers(), 32, 0.5, BLOCK=16)
    kernel[(1, 1, 1)](x, amount, 0.5, 16)


def other_device() -> None:
    add_kernel[(1,)](torch.zeros(16, device="cuda:1"), 1, 0.5, BLOCK=16)


def no_allocator() -> None:
    def launch() -> None:
        try:
            descriptor_kernel[(1,)](torch.zeros(32, 32, device="cuda"), 32, BLOCK=32)
        except RuntimeError as error:
            said.append(str(error))

    said: list[str] = []
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    launch()
    # The allocator is this thread's own.
    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert len(said) == 1


def capture(what: Callable[[], object]) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        what()


def beside_the_capture() -> None:
    add_kernel[(1,)](numbers(), 1, 0.5, BLOCK=16)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), torch.cuda.stream(torch.cuda.Stream()):
        add_kernel[(1,)](numbers(), 1, 0.5, BLOCK=16)


def inferring() -> None:
    with torch.inference_mode():
        waiting(lambda x: x.max().item())


def waiting(wait: Callable[[torch.Tensor], object]) -> None:
    capture(lambda: wait(numbers()))


def another_stream() -> None:
    kernel, x = add_kernel[(1,)](numbers(), 32, 0.5, BLOCK=16), numbers()
    with torch.cuda.stream(torch.cuda.Stream()):
        kernel.run(
            1, 1, 1, 0, kernel.function, kernel.packed_metadata, kernel.launch_metadata((1, 1, 1), 0, x, 32, 0.5, 16),
            None, None, x, 32, 0.5, 16,
        )  # fmt: skip


# Triton's launcher cuts the number off from 3.7 on, and refuses it before.
TOO_LARGE = r"amount \(i32\): 0x80000000 became -0x80000000|not launched: signed integer is greater than maximum"
# What is done, and what has to be said about it. A wait is looked for in every form that the house might use.
WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "if": lambda x: bool(x[0]),
    "tolist": torch.Tensor.tolist,
    "cpu": torch.Tensor.cpu,
    "to": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "nonzero": torch.nonzero,
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "copy": lambda x: torch.tensor([1.0], device="cuda"),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.Event().synchronize(),
}
FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "fault: tensors of another device": (other_device, r"launched on device 0 with tensors on \[1\]"),
    "fault: no multiple of 16": (lambda: compiled(numbers(), 33), "amount: compiled as a multiple of 16, got 33"),
    "fault: no aligned tensor": (lambda: compiled(numbers()[1:], 32), "x_ptr: compiled as a multiple of 16"),
    "fault: too large a number": (lambda: compiled(numbers(), 2**31), TOO_LARGE),
    "fault: not what was handed over": (
        lambda: compiled(numbers().as_subclass(Moving), 32),
        r"x_ptr \(\*fp32\): .* became",
    ),
    "fault: too many programs": (lambda: add_kernel[(1, 65536)](numbers(), 1, 0.5, BLOCK=16), "grid"),
    "fault: another stream": (another_stream, "launched on stream 0x0"),
    "fault: item in a capture, inferring": (inferring, "Tensor.item waits for the device"),
    "fault: beside a capture": (beside_the_capture, "launched beside the CUDA graph"),
    "fault: compiled in a capture": (
        lambda: capture(lambda: add_kernel[(1,)](numbers(), 1, 0.5, BLOCK=32)),
        "compiled while a CUDA graph is captured",
    ),
    "fault: no allocator": (no_allocator, "not launched: .*allocator"),
    **{
        f"fault: {name} in a capture": (partial(waiting, wait), "waits for the device while a CUDA graph is captured")
        for name, wait in WAITS.items()
    },
}
