"""The processes that train one model together, as torchrun or `--gpus` started them; one alone where nobody did."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import DiskError, InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Value = TypeVar("Value")

# The main process may take long to prepare data or to evaluate: the others then wait longer than for a collective.
PATIENCE = timedelta(days=7)

# These ask for a stop: Ctrl-C, a scheduler's end, a terminal that was closed, and a scheduler's warning.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def heeded_signals() -> list[signal.Signals]:
    """Return the signals that ask this process for a stop: without SIGHUP under nohup, which lets it be ignored."""
    ignored = [each for each in STOP_SIGNALS[2:] if signal.getsignal(each) is signal.SIG_IGN]
    return [each for each in STOP_SIGNALS if each not in ignored]


class LostProcessError(Exception):
    """Another process has not come to a collective in time, or is gone. The message says which, and where it was."""


class Processes:
    """This process among those that train together: `rank` of `count`. The main one, rank 0, writes and speaks.

    All processes call the collectives, in the same order.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, *, store: Any = None, group: Any = None, timeout: timedelta | None = None
    ) -> None:
        self.rank, self.count, self.store, self.group, self.timeout = rank, count, store, group, timeout
        self.waits = 0
        self.step = 0  # the step of training that is under way

    @property
    def main(self) -> bool:
        return self.rank == 0

    def at(self, place: str) -> None:
        """Note what this process is about to do. The others read it if this process is lost there."""
        if self.store is not None:
            self.store.set(f"place/{self.rank}", f"step {self.step}, {place}")

    def sum(self, tensor: "Tensor") -> "Tensor":
        """Sum a tensor over all processes, in place, on its device."""
        if self.count > 1:
            import torch

            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, *numbers: float, of: str = "") -> list[list[float]]:
        """Return the numbers of every process, by rank. They travel between CPUs, and so wait for no GPU.

        `of` says what they are; it is noted as by `at`.
        """
        if of:
            self.at(f"all-gather of {of}")
        if self.count == 1:
            return [list(numbers)]
        import torch

        own = torch.tensor(numbers, dtype=torch.float64)
        everyone = [torch.empty_like(own) for _ in range(self.count)]
        torch.distributed.all_gather(everyone, own, group=self.group)
        return [each.tolist() for each in everyone]

    def collect(self, value: Any) -> list[Any]:
        """Return the values of every process, by rank: plain data and tensors, so that nothing is unpickled.

        What json.dumps takes comes back as from JSON (a tuple as a list, say), and tensors come back on the CPU.
        """
        if self.count == 1:
            return [value]
        import torch

        own = _packed(value)
        sizes = [int(size) for (size,) in self.gather(len(own))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        everyone = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(everyone, padded, group=self.group)
        return [_unpacked(each[:size]) for each, size in zip(everyone, sizes, strict=True)]

    def together(self, work: Callable[[], Value]) -> Value:
        """Return the result of this process's own work. Where the disk refuses any process, all raise its DiskError."""
        result, refusal = None, ""
        try:
            result = work()
        except DiskError as error:
            refusal = str(error)
        for each in filter(None, self.collect(refusal)):
            raise DiskError(each)
        return result  # type: ignore[return-value]

    def from_main(self, work: Callable[[], Value]) -> Value:
        """Return the result of work that only the main process does, however long it takes. See `collect`."""
        result = None
        with self.first():
            if self.main:
                result = work()
        return self.collect(result)[0]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """The main process runs the block before the others, who find what it left, and raise its InputError too."""
        key = f"first/{self.waits}"
        self.waits += 1
        refusal = ""
        if not self.main:
            try:
                self.store.wait([key], PATIENCE)
                refusal = self.store.get(key).decode()
            except RuntimeError as error:
                raise self.lost(error) from error
            if refusal:
                raise InputError(refusal)
        try:
            yield
        except InputError as error:
            refusal = str(error)
            raise
        finally:
            if self.main and self.store is not None:
                self.store.set(key, refusal)

    def apart(self) -> "Processes":
        """Return the same processes with a group of their own: a thread's collectives must not mix with others."""
        if self.count == 1:
            return self
        import torch

        group = torch.distributed.new_group(backend="gloo", timeout=self.timeout)
        return Processes(self.rank, self.count, store=self.store, group=group, timeout=self.timeout)

    def refuse(self, error: InputError) -> None:
        """Tell the other processes why this one ends: they cannot go on either, and one of them has to say it."""
        if self.count > 1:
            self.store.set("refusal", str(error))

    def lost(self, error: RuntimeError) -> LostProcessError | InputError:
        """Return what a failed collective means: a refusal, or where each process was when it last noted its place."""
        self.store.set_timeout(timedelta(seconds=5))
        if self.store.check(["refusal"]):
            return InputError(self.store.get("refusal").decode())
        noted = []
        for rank in range(self.count):
            with contextlib.suppress(RuntimeError):
                noted.append(f"process {rank} was at {self.store.get(f'place/{rank}').decode()}")
        reason = str(error).strip().partition("\n")[0]
        return LostProcessError(f"process {self.rank} of {self.count} lost the others: {reason}\n{'; '.join(noted)}")


TENSOR = "a tensor, by its number"


def _packed(value: Any) -> "Tensor":
    """Return JSON and the tensors in it as the bytes of a safetensors file, uint8 [bytes]."""
    import torch
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}

    def number(tensor: Any) -> dict[str, str]:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{type(tensor).__name__} is no plain data, which is all that processes exchange")
        tensors[name := str(len(tensors))] = tensor.detach().cpu().contiguous().clone()
        return {TENSOR: name}

    text = json.dumps(value, default=number).encode()
    content = save({"json": torch.frombuffer(bytearray(text), dtype=torch.uint8), **tensors})
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _unpacked(content: "Tensor") -> Any:
    from safetensors.torch import load

    tensors = load(content.numpy().tobytes())
    text = tensors["json"].numpy().tobytes()
    return json.loads(text, object_hook=lambda found: tensors[found[TENSOR]] if TENSOR in found else found)


ALONE = Processes()


def join(device: "torch.device", minutes: float) -> Processes:
    """Join the other processes, by the environment that torchrun sets. Collectives fail after this many minutes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    import torch
    from torch.distributed.rendezvous import rendezvous

    # The flight recorder: where NCCL times out, every process writes down its last collectives.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    store, rank, count = next(rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # This store outlives its processes, and holds the addresses of those of earlier starts.
        store = torch.distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    gpu, timeout = device.type == "cuda", timedelta(minutes=minutes)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=torch.distributed.PrefixStore("groups", store),
        rank=rank,
        world_size=count,
        # Groups between CPUs, which can say who is missing, time out first. NCCL ends a process without such a word.
        timeout=2 * timeout,
        device_id=device if gpu else None,
    )
    processes = Processes(rank, count, store=torch.distributed.PrefixStore("places", store), timeout=timeout).apart()
    processes.at("its start")
    return processes


class Coordinator:
    """The clock and the stop signal that all processes agree on.

    A single process goes by its own clock, at any moment. Several must decide alike although their clocks differ: for
    them time stands still between two calls of `agree`, and a signal counts from the next call on. `give_up` is called
    where a single process is asked to stop, which may be waiting for something.
    """

    def __init__(self, processes: Processes, give_up: Callable[[], object] = lambda: None) -> None:
        self.processes, self.give_up = processes, give_up
        self.agreed_time = 0.0
        # The signal that this process was sent, and the one that asks all of them to stop.
        self.own_signal = 0
        self.stop: signal.Signals | None = None

    def agree(self) -> None:
        """Take over the main process's clock, and the signal of any process. Called by all of them at once."""
        everyone = self.processes.gather(time.perf_counter(), self.own_signal, of="clocks and signals")
        self.agreed_time = everyone[0][0]
        number = int(max(number for _, number in everyone))
        self.stop = signal.Signals(number) if number else None

    def ask_to_stop(self, number: int) -> None:
        """Ask all processes to stop, as this signal does."""
        self.own_signal = number
        if self.processes.count == 1:
            self.stop = signal.Signals(number)
            self.give_up()

    def now(self) -> float:
        """Return the time in seconds since some moment."""
        return time.perf_counter() if self.processes.count == 1 else self.agreed_time

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block a signal that asks for a stop is only noted, in `stop`.

        A second Ctrl-C, or a second SIGTERM, acts as it did before. SIGHUP often comes twice: from the shell and from
        the kernel. The handler prints nothing: that could break into a print that is under way.
        """
        # Python delivers signals to the main thread only; a run in another thread cannot be interrupted.
        in_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in heeded_signals() if in_main}

        def note(number: int, frame: object) -> None:
            self.ask_to_stop(number)
            if number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def peak_memory(device: "torch.device") -> int:
    """Return the most memory that this process has held so far, on a GPU that of the device, in bytes."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        # getrusage would be wrong here: a child process inherits the peak of the one that started it.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
