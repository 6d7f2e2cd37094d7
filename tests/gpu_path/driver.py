"""Triton's side of a GPU that is not there: its own driver and launcher on stub.c, with notes and checks about them."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Multiprocessors, and the most bytes of shared memory that one program may take.
CHIPS = {80: (108, 166912), 89: (128, 101376), 90: (132, 232448), 100: (148, 232448), 120: (170, 101376)}
# The one kernel whose work is done here: by its answer the backend is chosen.
PROBE = "jit.double_kernel"
WIDTH = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}


def full_name(function: Any) -> str:
    """Return a kernel's name with its module's: attention.forward.forward_kernel."""
    return f"{function.__module__.removeprefix('kernels.')}.{function.__name__}"


class Note(ctypes.Structure):
    """What cuLaunchKernelEx was given, as stub.c has it."""

    _fields_ = (
        ("function", ctypes.c_uint64), ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32), ("stream", ctypes.c_uint64), ("values", ctypes.c_uint64 * 128),
    )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    compiled: str  # hash of the compiled kernel
    device: int
    stream: int
    scratch: int  # bytes that the allocator was asked for


@dataclass
class Machine:
    """The GPUs of this process, all alike, and what they were told to do."""

    architecture: int
    devices: int = 2
    # The device that every tensor says it is on: the one that was named last.
    tensors_on: int = 0
    launches: list[Launch] = field(default_factory=list)
    # What was wrong, as "kernel: what", and how often.
    problems: Counter[str] = field(default_factory=Counter)
    # By hash; and, for each kernel, the hashes that this process compiled or loaded, in order.
    kernels: dict[str, Any] = field(default_factory=dict)
    compiled: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    # The streams on which CUDA graphs are being captured, and how many graphs were replayed.
    capturing: list[int] = field(default_factory=list)
    replays: int = 0

    @property
    def multiprocessors(self) -> int:
        return CHIPS[self.architecture][0]

    @property
    def shared_limit(self) -> int:
        return CHIPS[self.architecture][1]

    @property
    def name(self) -> str:
        return f"no GPU (sm_{self.architecture}, times are not real)"

    def waits(self, what: str) -> None:
        """Note that the host waits for the device."""
        if self.capturing:
            self.problems[f"{what} waits for the device while a CUDA graph is captured"] += 1


def why_not() -> str | None:
    """Return why there can be no such device here, or None."""
    if _compiler() is None:
        return "there is no C compiler, which Triton's own launcher needs"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h is missing, which Triton's own launcher needs"
    if torch.cuda.is_available():
        return "there is a GPU"
    return None


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")


def _load_stub() -> ctypes.CDLL:
    """Compile stub.c where it has not been, and load it under the name that Triton links against."""
    import triton

    source = Path(__file__).with_name("stub.c")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    # Which file it was built from, and for which Triton's cuda.h, is part of its place.
    key = hashlib.sha256(source.read_bytes() + triton.__version__.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"gpt-gpu-path-{os.getuid()}-{key}"
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            built = Path(aside) / library.name
            flags = ["-O1", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", f"-I{include}"]
            subprocess.run([str(_compiler()), *flags, str(source), "-o", str(built)], check=True)
            built.replace(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.stub_last.restype = ctypes.POINTER(Note)
    stub.stub_launches.restype = ctypes.c_long
    return stub


def install(architecture: int) -> Machine:
    """Make Triton compile for this architecture and launch on the stub."""
    stub = _load_stub()
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    machine = Machine(architecture)
    stub.stub_setup(machine.multiprocessors, machine.shared_limit)
    # The stub notes one launch at a time.
    lock = threading.Lock()
    by_metadata: dict[int, Any] = {}
    loaded_on: dict[int, int] = {}

    class Launcher(nvidia.CudaLauncher):
        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self.source, self.metadata = source, metadata
            kinds = [kind for kind in source.signature.values() if kind != "constexpr"]
            # Behind the kernel's own parameters come the places of its two kinds of scratch memory.
            sizes = [8 if kind.startswith("*") else WIDTH[kind] for kind in kinds] + [8, 8]
            self.sizes = (ctypes.c_int * len(sizes))(*sizes)

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            with lock:
                before = stub.stub_launches()
                stub.stub_expect(self.sizes, len(self.sizes))
                try:
                    super().__call__(x, y, z, stream, function, *rest)
                except Exception as error:
                    machine.problems[f"{full_name(self.source.fn)}: not launched: {error}"] += 1
                    raise
                kernel = by_metadata[id(self.metadata)]
                # What comes before the kernel's own arguments differs between Triton's versions.
                arguments = rest[len(rest) - len(self.source.fn.arg_names) :]
                self.note(kernel, (x, y, z), arguments, launched=stub.stub_launches() - before)
                if full_name(self.source.fn) == PROBE:
                    arguments[0].mul_(2)

        def note(self, kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], launched: int) -> None:
            note, name, device = stub.stub_last().contents, full_name(self.source.fn), torch.cuda.current_device()
            problems = [f"{launched} launches of one"] * (launched != 1)
            if grid[0] >= 2**31 or max(grid[1:]) > 65535 or tuple(note.grid) != grid:
                problems.append(f"grid {grid}")
            if note.shared > machine.shared_limit or note.block[0] != 32 * kernel.metadata.num_warps:
                problems.append(f"{note.shared} bytes of shared memory, {note.block[0]} threads")
            problems += self.wrong_parameters(kernel, note.values, arguments)
            if note.stream != (current := torch.cuda.current_stream(device).cuda_stream):
                problems.append(f"launched on stream {note.stream:#x}, not on the current one, {current:#x}")
            if machine.capturing and note.stream not in machine.capturing:
                problems.append("launched beside the CUDA graph that is captured")
            if device != loaded_on[id(self.metadata)]:
                problems.append(f"launched on device {device}, but loaded on {loaded_on[id(self.metadata)]}")
            where = {each.device.index for each in arguments if isinstance(each, torch.Tensor)}
            if where - {device}:
                problems.append(f"launched on device {device} with tensors on {sorted(where)}")
            machine.problems.update(f"{name}: {problem}" for problem in problems)
            scratch = grid[0] * grid[1] * grid[2] * kernel.metadata.global_scratch_size
            machine.launches.append(
                Launch(name, grid, note.block[0], note.shared, kernel.hash, device, note.stream, scratch)
            )

        def wrong_parameters(self, kernel: Any, values: Any, arguments: tuple[Any, ...]) -> list[str]:
            """Return what differs between the bytes that arrived and what was handed over or promised."""
            entry = kernel.asm["ptx"].split(".entry")[1].split(")")[0]
            declared = len(re.findall(r"^\s*\.param ", entry, re.MULTILINE))
            wrong = [f"{declared} parameters compiled, {len(self.sizes)} passed"] * (declared != len(self.sizes))
            promised = {key[0]: dict(map(tuple, pairs)) for key, pairs in self.source.attrs.items()}
            raws = iter(values)
            signature = self.source.signature.items()
            for place, ((name, kind), value) in enumerate(zip(signature, arguments, strict=True)):
                if kind == "constexpr":
                    continue
                raw = next(raws)
                if isinstance(value, torch.Tensor):
                    given = value.data_ptr()
                elif kind == "fp32":
                    given = int.from_bytes(ctypes.c_float(value), "little")
                else:
                    given = int(value or 0)
                    if kind in WIDTH:  # it has a sign
                        raw -= (raw >> (8 * WIDTH[kind] - 1)) << 8 * WIDTH[kind]
                if raw != given:
                    wrong.append(f"{name} ({kind}): {given:#x} became {raw:#x}")
                divisor = promised.get(place, {}).get("tt.divisibility", 1)
                if raw % divisor:
                    wrong.append(f"{name}: compiled as a multiple of {divisor}, got {raw}")
            return wrong

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), Launcher
            self.get_current_device = lambda: torch.cuda.current_device()
            self.set_current_device = lambda device: torch.cuda.set_device(device)
            self.get_current_stream = lambda device: torch.cuda.current_stream(device).cuda_stream
            self.get_device_capability = lambda device=0: divmod(architecture, 10)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", architecture, 32)

        def get_empty_cache_for_benchmark(self) -> torch.Tensor:
            return torch.empty(1)  # there is no L2 cache to empty, and a real one is 256 MB

    def compiled(*, key: str, fn: Any, **unused: Any) -> None:
        if machine.capturing:
            machine.problems[f"{full_name(fn.jit_function)}: compiled while a CUDA graph is captured"] += 1
        kernel = fn.jit_function.device_caches[torch.cuda.current_device()][0][key]
        machine.kernels[kernel.hash] = by_metadata[id(kernel.metadata)] = kernel
        loaded_on[id(kernel.metadata)] = torch.cuda.current_device()
        machine.compiled[full_name(fn.jit_function)].append(kernel.hash)

    triton.runtime.driver.set_active(Driver())
    knobs.runtime.jit_post_compile_hook = compiled
    return machine
