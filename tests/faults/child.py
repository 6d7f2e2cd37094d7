"""A command in a process of its own, forked from one that has imported everything: a case takes a tenth of a second.

The process that forks never computes and starts no thread: what it forks can do both.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import pkgutil
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# What a case may take before it is a runaway: the machine has to live on.
ADDRESS_BYTES = 12 * 2**30
FILE_BYTES = 2**28
PROCESSES = 40
RUNAWAY = 99
# After SIGTERM a command has this many seconds to come to an end.
GRACE = 20.0


ROOMS = ("kernels", "engine", "train", "rlhf", "bench", "cli")
# Scripts, which other people's interpreters run with what they need in the environment.
SCRIPTS = "bench.compatibility."


def modules() -> Iterator[str]:
    """Yield the names of all modules that a command may import."""
    for room in ROOMS:
        yield room
        for module in pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}."):
            if not module.name.endswith("__main__") and not module.name.startswith(SCRIPTS):
                yield module.name


def preload() -> None:
    """Import all that a command may need, and build the command line, before anything is forked."""
    import typer.main

    for name in (
        *modules(),
        "safetensors.torch",
        "sentencepiece",
        "tokenizers",
        "pyarrow.parquet",
        "fastapi",
        "uvicorn",
    ):
        importlib.import_module(name)
    import matplotlib.figure

    import train.trainer
    from cli.main import app

    # These two take longer than what is tried here: what counts is that a file is written, and that there is a number.
    quick: Any = lambda self, file, **_: file.write(b"a plot")  # noqa: E731
    matplotlib.figure.Figure.savefig = quick  # type: ignore[method-assign]
    train.trainer.measured_peak = lambda runtime, seconds=0.0: 1e10
    command = typer.main.get_command(app)
    typer.main.get_command = lambda typer_instance: command
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, or -signal; `hung` where only SIGKILL ended it."""

    code: int
    out: str
    err: str
    seconds: float
    hung: bool = False
    stopped: bool = False  # by SIGTERM, after its time
    left: int = 0  # processes of its group that outlived it

    @property
    def said(self) -> str:
        return self.out + self.err


class Child:
    """A forked process that runs `work` in `folder`, and leads a group of its own."""

    def __init__(self, work: Callable[[], object], folder: Path, environment: dict[str, str] | None = None) -> None:
        self.files = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]
        for file in self.files:
            file.write_bytes(b"")
        self.begun = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _work(work, folder, self.files, environment or {})
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)

    def poll(self) -> bool:
        """Whether it is still at work."""
        info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return info is None

    def read(self) -> str:
        return "".join(file.read_text(errors="replace") for file in self.files)

    def until(self, text: str, limit: float = 60.0) -> bool:
        """Wait until it has said this."""
        while text not in self.read():
            if not self.poll() or time.monotonic() - self.begun > limit:
                return text in self.read()
            time.sleep(0.02)
        return True

    def send(self, number: int, *, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, limit: float = 60.0, *, until: str | None = None) -> Done:
        """Wait for its end; after `limit` seconds, or where it has said `until`, it is sent SIGTERM, then SIGKILL."""
        stopped = hung = False
        end = self.begun + limit
        pause = 0.002
        while self.poll():
            late = time.monotonic() > end
            if not stopped and (late or (until is not None and until in self.read())):
                self.send(signal.SIGTERM)
                stopped, end = True, time.monotonic() + GRACE
            elif late:
                hung = True
                self.send(signal.SIGKILL, group=True)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self.begun
        left = self._end_group()
        out, err = (file.read_text(errors="replace") for file in self.files)
        return Done(os.waitstatus_to_exitcode(status), out, err, seconds, hung, stopped, left)

    def kill(self) -> None:
        """End it and all its children at once, as a power cut would."""
        self.send(signal.SIGKILL, group=True)
        os.waitpid(self.pid, 0)
        self._end_group()

    def _end_group(self) -> int:
        """Kill what is left of the group after some seconds; return how many processes that were."""
        for _ in range(300):
            if not (left := _members(self.pid)):
                return 0
            time.sleep(0.01)
        self.send(signal.SIGKILL, group=True)
        return len(left)


def _members(group: int) -> list[int]:
    found: list[int] = []
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return found
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, _, process_group = status.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(int(status.parent.name))
    return found


def _work(work: Callable[[], object], folder: Path, files: list[Path], environment: dict[str, str]) -> None:
    """Do the work, and end: this never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        for descriptor, path in enumerate(("/dev/null", *files)):
            opened = os.open(str(path), os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_APPEND)
            os.dup2(opened, descriptor)
            os.close(opened)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        for limit, value in (
            (resource.RLIMIT_AS, ADDRESS_BYTES),
            (resource.RLIMIT_FSIZE, FILE_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(limit, (value, value))
        os.environ.update(environment)
        # A worker of a pool may have no children; a command may.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        os.chdir(folder)
        _count_processes()
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            # As the interpreter does at its end: it waits for threads.
            threading._shutdown()  # type: ignore[attr-defined]
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        os._exit(code & 255)


def _count_processes() -> None:
    """Let nothing start processes without end."""
    start: Any = BaseProcess.start
    begun = 0

    def counted(process: BaseProcess) -> None:
        nonlocal begun
        begun += 1
        if begun > PROCESSES:
            print(f"runaway: more than {PROCESSES} processes", file=sys.stderr, flush=True)
            os._exit(RUNAWAY)
        start(process)

    BaseProcess.start = counted  # type: ignore


def gpt(*words: object) -> Callable[[], None]:
    """The work of `gpt` with these words, as the shell would start it."""

    def work() -> None:
        from cli.main import main

        sys.argv = ["gpt", *map(str, words)]
        main()

    return work


def run(
    work: Callable[[], object],
    folder: Path,
    limit: float = 60.0,
    *,
    until: str | None = None,
    environment: dict[str, str] | None = None,
) -> Done:
    return Child(work, folder, environment).wait(limit, until=until)


@contextlib.contextmanager
def copied(folder: Path, into: Path) -> Iterator[Path]:
    """A copy of a folder, for as long as the block lasts."""
    into.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, into, symlinks=True)
    try:
        yield into
    finally:
        shutil.rmtree(into, ignore_errors=True)
