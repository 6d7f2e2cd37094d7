"""A GPU that is not there: the whole path of a launch, on a machine without a GPU.

What is real: Triton's binder, specialisation, cache keys and grid, its compiler down to machine code of the chosen
architecture, its launcher with the packing of parameters, our operators, and autograd on a thread of its own. What is
not: nothing runs. stub.c takes the place of libcuda and notes each launch (driver.py); CPU tensors say that they are on
a GPU, and torch.cuda answers for it (cuda.py). What kernels should have written is 0.

Checked at every launch: each parameter's bytes are what Python handed over; what was promised to the compiler
(multiples of 16) holds; device and stream are the thread's current ones, and all tensors are there; grid and shared
memory are within the device's; an allocator was there where scratch memory is needed; nothing is compiled, and nothing
waits for the device, while a CUDA graph is captured.

Not seen: whatever happens on the chip (wrong addresses, races, faults of the copy engine), time, a tensor that was
forgotten on the CPU, torch.compile.

    gpu = gpu_path.install(90)         # once in a process, before Triton's first launch
    ...                                # anything, with device="cuda"
    gpu.problems                       # must be empty

`python -m tests.gpu_path [--arch 90] COMMAND...` runs a command of `gpt` on such a device. The tests run scenarios.py:
calls of every kernel function (options.py), whole passes (passes.py), and launches that are wrong on purpose, each of
which must be found (faults.py).
"""

from tests.gpu_path.driver import Machine, why_not


def install(architecture: int = 90) -> Machine:
    """Give this process GPUs of an architecture (80, 89, 90, 100, 120). Raises RuntimeError for the reason why not."""
    import os

    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    # Kernels that are interpreted are launched nowhere.
    os.environ.pop("TRITON_INTERPRET", None)
    from tests.gpu_path import cuda, driver

    machine = driver.install(architecture)
    cuda.install(machine)
    return machine


__all__ = ["Machine", "install", "why_not"]
