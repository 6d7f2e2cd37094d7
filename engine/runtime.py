"""The machine: which device and precision to compute with, how fast it multiplies, and its random numbers."""

import contextlib
import ctypes
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError, meant
from engine.processes import ALONE, Processes, peak_memory
from kernels import cpu
from kernels.backend import backend, why_not_triton

# int8 is fp32, except for weights, keys and values when a CPU generates (engine/native.py).
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}


@dataclass(frozen=True)
class Runtime:
    """The device that a model runs on, and what it multiplies in. While training, weights are kept in fp32."""

    device: torch.device
    precision: str
    processes: Processes = ALONE
    # The measured peak FLOP/s of the devices of all processes together; 0 until it was measured.
    peak_flops: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def describe(self) -> str:
        if self.device.type == "cuda":
            about = f"{torch.cuda.get_device_name(self.device)}, {self.precision}"
            if backend(self.device) == "triton":
                return about
            why = "GPT_KERNELS=torch" if os.environ.get("GPT_KERNELS") else why_not_triton(self.device) or ""
            return f"{about}, slow without our kernels ({why.partition(chr(10))[0]})"
        missing = cpu.why_not(self.device, self.dtype)
        slow = f", slow to generate ({missing})" if missing else ""
        return f"{self.device.type}, {torch.get_num_threads()} threads, {self.precision}{slow}"

    def peak_memory(self) -> int:
        """Return the most memory that this process has held so far, in bytes."""
        return peak_memory(self.device)


def choose(device: str = "auto", precision: str = "auto") -> Runtime:
    """Return the runtime for this machine. "auto" is the GPU if there is one, and bf16 if the hardware multiplies it.

    Raises InputError for a device that does not exist, or for a precision that it cannot compute in.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", device):
        raise InputError(f"--device {device} cannot be used: it takes auto, cpu, cuda or cuda:N")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name == "cuda" and here > 1:
        if here > torch.cuda.device_count():
            raise InputError(f"{here} processes need as many GPUs; this machine has {torch.cuda.device_count()}")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen)
        if chosen.type == "cuda":
            # What names no device uses the current one, of this thread: Triton, CUDA graphs, and libraries.
            chosen = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
            torch.cuda.set_device(chosen)
    except (RuntimeError, AssertionError):
        has = "a CUDA device" if torch.cuda.is_available() else "no CUDA device"
        raise InputError(f"--device {device} cannot be used: this machine has {has}; try --device cpu") from None
    try:
        why = why_not_triton(chosen) if backend(chosen) == "triton" else None
    except ValueError as error:
        raise InputError(str(error)) from None
    if why:
        raise InputError(
            f"GPT_KERNELS=triton cannot run on {chosen}: {why.splitlines()[0]}; unset it, or set TRITON_INTERPRET=1 "
            "too, with which a CPU runs the kernels, slowly"
        )
    if precision == "auto":
        precision = native_precision(chosen)
    if precision not in DTYPES:
        known = ("auto", *DTYPES)
        raise InputError(f"--precision is {precision!r}; it must be {', '.join(known)}{meant(precision, known)}")
    if precision == "int8" and chosen.type != "cpu":
        raise InputError("--precision int8 is for decoding on a CPU; on a GPU use bf16 or fp16")
    if precision == "fp16" and chosen.type == "cpu":
        raise InputError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    if chosen.type == "cpu":
        keep_freed_memory()
    return Runtime(chosen, precision)


def keep_freed_memory() -> None:
    """Let the C library keep what tensors up to 32 MiB leave, where it is glibc: the next ones find it there.

    It would give the end of its memory back after each training step. Every page that the next one then touches for the
    first time is a fault: a ninth of nano's time in bf16.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, the most that glibc allows
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> int:
    """Return the bytes that a device has left for more tensors; on the CPU what programs could still be given."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def native_precision(device: torch.device) -> str:
    """Return the narrowest precision for training that the device multiplies in hardware."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_multiplies_bf16() else "fp32"


def cpu_multiplies_bf16() -> bool:
    """Return whether this CPU multiplies bf16 (AMX or AVX512-BF16). Without that it is emulated, 90 times slower."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities: Mapping[str, Any] = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    # torch 2.11 has no get_capabilities.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed every generator. `deterministic` also makes PyTorch refuse operations that vary from run to run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of PyTorch's generators, as tensors that a checkpoint can hold."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def measured_peak(runtime: Runtime, seconds: float = 0.2) -> float:
    """Measure one large matrix product: the most that this machine can do, in FLOP/s (a multiply-add counts two)."""
    size = 8192 if runtime.device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=runtime.device).to(runtime.dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        best = min(best, wall_seconds(lambda: torch.mm(a, b), runtime.device))
    return 2 * size**3 / best


def wall_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return how long one call takes, to the end of what it leaves the device to do."""
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ToHost:
    """A copy of a tensor on its way to the host. The device continues meanwhile; to read it waits until it is there."""

    def __init__(self, tensor: Tensor) -> None:
        self.arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.tensor.copy_(tensor, non_blocking=True)
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrived.record(torch.cuda.current_stream(tensor.device))
        else:
            self.tensor = tensor.clone()

    def read(self) -> Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor

    def tolist(self) -> Any:
        return self.read().tolist()


@contextlib.contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Set evaluation mode, without gradients, within the block; afterwards the model is in its mode again."""
    was_training = model.training
    # Changing the mode visits all modules, which takes longer than a small model needs for its next token.
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()
