"""The runs in a folder at a glance, from their files alone: neither torch nor the weights are read."""

import contextlib
import fcntl
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engine import checkpoint, records
from engine.config import IMPORTED, Recipe
from engine.errors import InputError
from engine.folders import HELD, LOCK
from engine.run import Run, run_folders

# The newest lines of metrics.jsonl stand in its last bytes; a long run's file has hundreds of megabytes.
TAIL_BYTES = 1 << 16
# What plans more is no line of ours.
MOST_STEPS = 1e15

State = Literal["running", "done", "stopped", "damaged"]


@dataclass(frozen=True)
class Line:
    """What is read of a line of metrics.jsonl."""

    step: int
    loss: float | None = None
    validation_loss: float | None = None
    progress: float | None = None


@dataclass(frozen=True)
class Listed:
    """A run at a glance. What could not be read has its default, and `damage` says why."""

    path: Path
    kind: str = ""  # see `kind_of`
    base: str | None = None
    step: int = 0
    steps: int | None = None  # planned; where minutes were planned, an estimate
    loss: float | None = None  # of the newest evaluation; else of the last step that was logged
    validated: bool = False  # whether it is the loss of an evaluation
    bytes: int = 0  # on disk, the folder with all that is in it
    saved: float | None = None  # when the newest checkpoint was made, in seconds since 1970
    state: State = "stopped"
    damage: str = ""


def list_runs(folder: Path) -> list[Listed]:
    """Return the runs in a folder and below, or the folder itself where it is one, by their paths."""
    return [read_listed(path) for path in run_folders(folder)]


def read_listed(path: Path) -> Listed:
    """Return a run at a glance. It raises nothing for a damaged one."""
    run, found, damage = Run(path), Listed(path), list[str]()
    with _noting(damage):
        recipe = run.read_recipe()
        base = None if recipe.base is None else os.path.relpath(recipe.base, path.resolve().parent)
        # There is nothing to train in an imported one.
        state: State = "done" if recipe.data.source == IMPORTED else "stopped"
        found = replace(found, kind=kind_of(recipe), base=base, state=state)
    with _noting(damage):
        if saved := checkpoint.checkpoints(run.checkpoints):
            found = replace(found, step=saved[-1].step, saved=saved[-1].path.stat().st_mtime)
            saved[-1].verify(contents=False)
        losses = ((each.evaluation() or {}).get("loss") for each in reversed(saved))
        if (loss := next((loss for loss in losses if loss is not None), None)) is not None:
            found = replace(found, loss=loss, validated=True)
    with _noting(damage):
        trained, evaluated = _last_lines(run.metrics)
        if trained.progress and (steps := trained.step / min(1.0, trained.progress)) < MOST_STEPS:
            # A checkpoint may be newer than the line, since not every step is logged.
            found = replace(found, step=max(found.step, trained.step), steps=round(steps))
            found = replace(found, state="done" if trained.progress >= 1 else found.state)
        if evaluated.validation_loss is not None or not found.validated:
            validated = evaluated.validation_loss is not None
            found = replace(found, loss=evaluated.validation_loss or trained.loss, validated=validated)
    with _noting(damage):
        found = replace(found, bytes=_size(path), state="running" if is_written(path) else found.state)
    return replace(found, state="damaged", damage=damage[0]) if damage else found


def kind_of(recipe: Recipe) -> str:
    """Return what a run is: import, pretrain, finetune, reward, or the method that aligned it."""
    if recipe.data.source == IMPORTED:
        return "import"
    if recipe.scores:
        return "reward"
    if recipe.base is None:
        return "pretrain"
    return "finetune" if recipe.alignment.method == "none" else recipe.alignment.method


def is_written(folder: Path) -> bool:
    """Return whether a command holds the folder's lock (engine/folders.py), on this machine or another one.

    The lock is only asked about: to take it, even for a moment, could turn away who comes for it.
    """
    try:
        with open(folder / LOCK, "rb") as file:
            if sys.platform != "linux":
                return True
            # C's struct flock: type, whence, start, length, process.
            asked = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
            return bool(struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)
    except FileNotFoundError:
        return False
    except OSError as error:  # a file system without locks
        return error.errno not in HELD


@contextlib.contextmanager
def _noting(damage: list[str]) -> Iterator[None]:
    """Add to the list what cannot be read within the block."""
    try:
        yield
    except (InputError, checkpoint.DamagedCheckpointError) as error:
        damage.append(str(error))
    except OSError as error:
        damage.append(f"{error.filename}: {error.strerror}")


def _size(path: Path) -> int:
    size = 0
    for at, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a checkpoint that has just been removed
                size += Path(at, name).lstat().st_size
    return size


def _last_lines(path: Path) -> tuple[Line, Line]:
    """Return the newest records of a step and of an evaluation in metrics.jsonl; at step 0 where there are none."""
    found: dict[str, Line] = {}
    if path.exists():
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")
        for text in reversed(lines):
            with contextlib.suppress(ValueError):  # a line cut in two, or damaged
                # The loss of a step that was skipped may be NaN, which other programs do not take as JSON.
                record = records.parse(text.decode(), parse_constant=lambda name: None)
                line = records.conform(record, Line, ValueError)
                found.setdefault("step" if line.progress is not None else "evaluation", line)
            if len(found) == 2:
                break
    return found.get("step", Line(0)), found.get("evaluation", Line(0))
