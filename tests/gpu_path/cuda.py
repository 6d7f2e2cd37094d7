"""torch's side of a GPU that is not there: torch.cuda answers for it, and CPU tensors say that they are on it."""

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu_path.driver import Machine

MAKE = (
    "empty zeros ones full tensor as_tensor asarray arange linspace eye rand randn randint randperm empty_like "
    "zeros_like ones_like full_like rand_like randn_like randint_like empty_strided scalar_tensor tril_indices "
    "triu_indices"
)
MAKE_NEW = "new_empty new_zeros new_ones new_full new_tensor new_empty_strided"
# What a capture forbids, since it would wait for the device: methods, and operators (not seen in inference mode).
WAIT = "tolist cpu numpy item __bool__ __int__ __float__ __index__ nonzero"
WAITING = "_local_scalar_dense nonzero masked_select equal is_nonzero unique_consecutive unique_dim _unique2"
GIB = 2**30
# What is registered lives as long as this object.
LIBRARY = torch.library.Library("aten", "IMPL")


def install(machine: Machine) -> None:
    """Make this process believe that its CPU tensors are on the GPUs of the machine."""
    import torch._dynamo  # it looks at every function of torch when it is imported, and must find the real ones

    _replace_factories(machine)
    _replace_device_of_tensors(machine)
    _replace_backward(machine)
    _add_products()
    for name, value in _answers(machine).items():
        setattr(torch.cuda, name, value)


def _replace_factories(machine: Machine) -> None:
    """Let whatever makes a tensor on a GPU make it on the CPU; what is empty holds zeros, not what lay there.

    All tensors are then said to be on the GPU that was named last. One that is made on "cuda", which is the current
    device, while the others are elsewhere is noted as a problem.
    """

    def on_cpu(device: Any) -> Any:
        if device is None or (asked := torch.device(device)).type != "cuda":
            return device
        if asked.index is not None:
            machine.tensors_on = asked.index
        elif (current := torch.cuda.current_device()) != machine.tensors_on:
            machine.problems[f"a tensor was made on device {current}; the others are on {machine.tensors_on}"] += 1
        return torch.device("cpu")

    def replaced(function: Callable[..., Any], fill: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def make(*arguments: Any, **options: Any) -> Any:
            if "device" in options:
                if machine.capturing and function.__name__ in ("tensor", "as_tensor", "asarray"):
                    machine.waits(f"torch.{function.__name__}")
                options["device"] = on_cpu(options["device"])
            options.pop("pin_memory", None)
            made = function(*arguments, **options)
            if fill:
                made.detach().zero_()  # it may be a leaf that takes a gradient
            return made

        return make

    tensor: Any = torch.Tensor
    for name in MAKE.split():
        setattr(torch, name, replaced(getattr(torch, name), "empty" in name))
    for name in MAKE_NEW.split():
        setattr(tensor, name, replaced(getattr(tensor, name), "empty" in name))

    move = torch.Tensor.to

    def to(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if arguments and isinstance(arguments[0], str | torch.device | int):
            arguments = (on_cpu(arguments[0]), *arguments[1:])
        if "device" in options:
            options["device"] = on_cpu(options["device"])
        if machine.capturing and "cpu" in map(str, (*arguments, *options.values())):
            machine.waits("Tensor.to")
        return move(self, *arguments, **options)

    tensor.to = to
    tensor.cuda = lambda self, *unused, **options: self
    tensor.pin_memory = lambda self, *unused: self
    tensor.record_stream = lambda self, stream: None

    class Generator(torch._C.Generator):
        def __new__(cls, device: Any = None) -> Any:
            return super().__new__(cls, device=on_cpu(device or "cpu"))  # type: ignore[call-arg]

        def __init__(self, device: Any = None) -> None:
            super().__init__()

    torch.Generator = Generator  # type: ignore[misc]


def _replace_device_of_tensors(machine: Machine) -> None:
    holder: Any = torch.Tensor
    really = torch._C.TensorBase.device.__get__

    def device(self: torch.Tensor) -> torch.device:
        kind = really(self).type
        return torch.device("cuda", machine.tensors_on) if kind == "cpu" else torch.device(kind)

    holder.device = property(device)
    holder.is_cuda = property(lambda self: device(self).type == "cuda")
    holder.is_cpu = property(lambda self: False)
    holder.get_device = lambda self: machine.tensors_on

    def waiting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wait(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            machine.waits(f"Tensor.{name}")
            return function(self, *arguments, **options)

        return wait

    for name in WAIT.split():
        setattr(holder, name, waiting(name, getattr(holder, name)))


def _replace_backward(machine: Machine) -> None:
    """Run the way back on a thread of its own, as autograd does for a GPU: only device and stream are set there.

    Autograd takes the stream of the forward pass, which is not known here: the caller's stands for it.
    """
    for name in ("backward", "grad"):
        original = getattr(torch.autograd, name)

        def aside(*arguments: Any, original: Callable[..., Any] = original, **options: Any) -> Any:
            deterministic = torch.are_deterministic_algorithms_enabled()
            stream = torch.cuda.current_stream(machine.tensors_on)

            def run() -> Any:
                torch.cuda.set_device(machine.tensors_on)
                torch.use_deterministic_algorithms(deterministic)
                with torch.cuda.stream(stream):
                    return original(*arguments, **options)

            with ThreadPoolExecutor(1) as thread:
                return thread.submit(run).result()

        setattr(torch.autograd, name, functools.wraps(original)(aside))


class Waits(TorchDispatchMode):
    """Note operators for whose result the host would have to wait: their shape, or their value, is on the device."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = func.overloadpacket.__name__, kwargs or {}
        by_mask = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        of_unknown_size = name == "repeat_interleave" and options.get("output_size") is None
        if name in WAITING.split() or by_mask or of_unknown_size:
            self.machine.waits(name)
        return func(*args, **options)


def _add_products() -> None:
    """Give the CPU the products with another dtype for their result, which torch has for GPUs alone."""

    def mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return a.to(dtype) @ b.to(dtype)

    def mm_out(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(mm(a, b, dtype))

    def addmm(
        add: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1
    ) -> torch.Tensor:
        return beta * add + alpha * mm(a, b, dtype)

    def addmm_out(*arguments: Any, out: torch.Tensor, **options: Any) -> torch.Tensor:
        return out.copy_(addmm(*arguments, **options))

    LIBRARY.impl("mm.dtype", mm, "CPU")
    LIBRARY.impl("mm.dtype_out", mm_out, "CPU")
    LIBRARY.impl("addmm.dtype", addmm, "CPU")
    LIBRARY.impl("addmm.dtype_out", addmm_out, "CPU")


def _answers(machine: Machine) -> dict[str, Any]:
    """Return what torch.cuda is replaced by."""
    here = threading.local()
    handles = iter(range(1 << 20, 1 << 40, 16))

    class Stream:
        """A queue of a device. `cuda_stream` is the handle that kernels are launched with."""

        def __init__(self, device: Any = None, priority: int = 0, **unused: Any) -> None:
            self.device, self.cuda_stream = torch.device("cuda", index(device)), next(handles)
            self.device_index = self.device.index

        def wait_stream(self, other: "Stream") -> None: ...
        def wait_event(self, event: "Event") -> None: ...
        def synchronize(self) -> None:
            machine.waits("Stream.synchronize")

        def query(self) -> bool:
            return True

        def record_event(self, event: "Event | None" = None) -> "Event":
            return event or Event()

    class Event:
        def __init__(self, *unused: Any, **options: Any) -> None: ...
        def record(self, stream: Stream | None = None) -> None: ...
        def wait(self, stream: Stream | None = None) -> None: ...
        def synchronize(self) -> None:
            machine.waits("Event.synchronize")

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: "Event") -> float:
            return 1000.0  # milliseconds: nobody repeats what takes a second

    class CUDAGraph:
        def pool(self) -> tuple[int, int]:
            return (0, 0)

        def replay(self) -> None:
            machine.replays += 1

        def reset(self) -> None: ...

    @contextlib.contextmanager
    def graph(graph: CUDAGraph, pool: Any = None, stream: Any = None, **options: Any) -> Iterator[None]:
        stream = stream or Stream()
        with use(stream), Waits(machine):
            machine.capturing.append(stream.cuda_stream)
            try:
                yield
            finally:
                machine.capturing.pop()

    def index(device: Any = None) -> int:
        if device is None or isinstance(device, int):
            return here.__dict__.get("device", 0) if device is None else device
        found = torch.device(device).index
        return index() if found is None else found

    def set_device(device: Any) -> None:
        if not 0 <= (chosen := index(device)) < machine.devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        here.device = chosen

    @contextlib.contextmanager
    def guard(device: Any) -> Iterator[None]:
        before = index()
        if device is not None:
            set_device(device)
        try:
            yield
        finally:
            here.device = before

    usual = {place: Stream(place) for place in range(machine.devices)}
    for place, stream in usual.items():
        stream.cuda_stream = place  # the legacy stream has handle 0

    def current_stream(device: Any = None) -> Stream:
        return here.__dict__.get("streams", {}).get(index(device)) or usual[index(device)]

    @contextlib.contextmanager
    def use(stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        streams = here.__dict__.setdefault("streams", {})
        before = streams.get(stream.device.index)
        streams[stream.device.index] = stream
        try:
            with guard(stream.device):
                yield
        finally:
            streams[stream.device.index] = before

    major, minor = divmod(machine.architecture, 10)
    properties = types.SimpleNamespace(
        name=machine.name, major=major, minor=minor, total_memory=140 * GIB, warp_size=32,
        multi_processor_count=machine.multiprocessors, L2_cache_size=50 * 2**20,
        shared_memory_per_block_optin=machine.shared_limit,
    )  # fmt: skip
    memory = dict.fromkeys(("max_memory_allocated", "memory_allocated", "max_memory_reserved", "memory_reserved"))
    nothing = (
        "empty_cache",
        "reset_peak_memory_stats",
        "manual_seed",
        "manual_seed_all",
        "init",
        "_lazy_init",
    )
    return {
        **dict.fromkeys(nothing, lambda *unused, **options: None),
        **dict.fromkeys(memory, lambda *unused: GIB),
        "synchronize": lambda *unused: machine.waits("torch.cuda.synchronize"),
        "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "stream": use,
        "current_stream": current_stream, "default_stream": lambda device=None: usual[index(device)],
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: machine.devices,
        "current_device": index, "set_device": set_device, "device": guard,
        "get_device_name": lambda *unused: machine.name, "get_device_properties": lambda *unused: properties,
        "get_device_capability": lambda *unused: (major, minor), "mem_get_info": lambda *unused: (130 * GIB, 140 * GIB),
        "is_bf16_supported": lambda *unused, **options: True, "can_device_access_peer": lambda *unused: True,
        "is_current_stream_capturing": lambda: bool(machine.capturing),
        "get_rng_state": lambda *unused: torch.get_rng_state(), "set_rng_state": lambda *unused: None,
    }  # fmt: skip
