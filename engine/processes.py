"""The processes that train one model together, as torchrun or `--gpus` started them; one alone where nobody did."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.errors import InputError

Value = TypeVar("Value")

# The main process may prepare data, or evaluate, for long: the others wait for it beyond the timeout of a collective.
PATIENCE = timedelta(days=7)


class LostProcessError(Exception):
    """Another process has not come to a collective in time, or is gone. The message says which, and where it was."""


class Processes:
    """This process among those that train together: `rank` of `count`. The main one, rank 0, writes and speaks.

    Collectives are met by all of them, in the same order.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, *, store: Any = None, group: Any = None, timeout: timedelta | None = None
    ) -> None:
        self.rank, self.count, self.store, self.group, self.timeout = rank, count, store, group, timeout
        self.waits = 0

    @property
    def main(self) -> bool:
        return self.rank == 0

    def at(self, place: str) -> None:
        """Note what this process is about to do: the others read it where it is not seen again."""
        if self.store is not None:
            self.store.set(f"place/{self.rank}", place)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes, in place, on the tensor's device."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, *numbers: float) -> list[list[float]]:
        """The numbers of every process, by rank. They travel between CPUs, and so wait for no GPU."""
        if self.count == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.count)]
        torch.distributed.all_gather(everyone, mine, group=self.group)
        return [each.tolist() for each in everyone]

    def collect(self, value: Value) -> list[Value]:
        """The values of every process, by rank."""
        everyone = [value] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(everyone, value, group=self.group)
        return everyone

    def from_main(self, work: Callable[[], Value]) -> Value:
        """The result of some work that the main process alone does, however long it takes."""
        result = None
        with self.first():
            if self.main:
                result = work()
        return self.collect(result)[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """The main process goes through the block before the others, who find what it left and share its InputError."""
        key = f"first/{self.waits}"
        self.waits += 1
        refusal = ""
        if not self.main:
            self.store.wait([key], PATIENCE)
            if refusal := self.store.get(key).decode():
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
        """The same processes, with a group of their own: for a thread, whose collectives must not mix with others'."""
        if self.count == 1:
            return self
        group = torch.distributed.new_group(backend="gloo", timeout=self.timeout)
        return Processes(self.rank, self.count, store=self.store, group=group, timeout=self.timeout)

    def lost(self, error: RuntimeError) -> LostProcessError:
        """What a failed collective means: where every process was when it was last heard of."""
        self.store.set_timeout(timedelta(seconds=5))
        places = []
        for rank in range(self.count):
            with contextlib.suppress(RuntimeError):
                places.append(f"process {rank} was at {self.store.get(f'place/{rank}').decode()}")
        reason = str(error).strip().partition("\n")[0]
        return LostProcessError(f"process {self.rank} of {self.count} lost the others: {reason}\n{'; '.join(places)}")


ALONE = Processes()


def join(device: torch.device, minutes: float) -> Processes:
    """Meet the processes of the environment that torchrun sets. Collectives fail after so many minutes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from torch.distributed.rendezvous import rendezvous

    # The flight recorder: where NCCL times out, every process writes down its last collectives.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    store, rank, count = next(rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It outlives its processes, and knows the addresses of those that are gone.
        store = torch.distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    gpu, timeout = device.type == "cuda", timedelta(minutes=minutes)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=torch.distributed.PrefixStore("groups", store),
        rank=rank,
        world_size=count,
        # The groups that say who is missing come first: those of GPUs end their process without a word of its step.
        timeout=2 * timeout,
        device_id=device if gpu else None,
    )
    processes = Processes(rank, count, store=torch.distributed.PrefixStore("places", store), timeout=timeout).apart()
    processes.at("its start")
    return processes


class Coordinator:
    """The clock and the stop signal that all processes agree on.

    A single process goes by its own clock at any moment. Several must decide alike, although their clocks differ: for
    them the time stands still between two calls of `agree`, and a signal counts from the next call on.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.own_signal: signal.Signals | None = None
        self.agreed = (0.0, 0)

    def agree(self) -> None:
        """Take over the main process's clock, and any process's signal. Called by all processes at once."""
        everyone = self.processes.gather(time.perf_counter(), self.own_signal or 0)
        self.agreed = everyone[0][0], int(max(number for _, number in everyone))

    def now(self) -> float:
        """The time in seconds, from an arbitrary beginning."""
        return time.perf_counter() if self.processes.count == 1 else self.agreed[0]

    @property
    def stop(self) -> signal.Signals | None:
        """The signal that asks the run to stop, if there was one."""
        if self.processes.count == 1:
            return self.own_signal
        return signal.Signals(self.agreed[1]) if self.agreed[1] else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, Ctrl-C and SIGTERM only take note of the signal; a second one acts as it did before.

        Nothing is printed from the handler: it could break into a print that is under way.
        """
        watched = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in watched}

        def restore() -> None:
            for number in watched:
                signal.signal(number, before[number])

        def take_note(number: int, frame: object) -> None:
            self.own_signal = signal.Signals(number)
            restore()

        try:
            for number in watched:
                signal.signal(number, take_note)
        except ValueError:
            # Python lets the main thread alone listen; nobody can interrupt the run in another one.
            yield
            return
        try:
            yield
        finally:
            restore()
