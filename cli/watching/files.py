"""What the page is told of runs, from their files alone. Nothing is written, and torch is not imported."""

import hashlib
import json
import os
import re
import statistics
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine import records
from engine.config import settings
from engine.errors import InputError
from engine.run import Run, run_folders
from engine.runs import TAIL_BYTES, is_written, read_listed

METRICS, SAMPLES, BEST_OF_N = "metrics.jsonl", "samples.md", "best-of-n.json"
# A run is drawn with about so many points. Where it has more lines, each point is the mean of several.
POINTS = 2000
# The most that is read of a file at a time.
CHUNK_BYTES, SAMPLES_BYTES = 1 << 23, 1 << 20
# What stands before the place where a reader has stopped tells whether the file still is the same up to there.
TAG_BYTES = 256
# Of these the last line of several counts, of others the mean.
LAST = ("step", "tokens", "seconds", "epoch", "progress", "seconds_left", "round", "skipped", "memory")
# What the list and the table show of a run's newest lines.
SHOWN = (
    *("loss", "bits_per_byte", "validation_loss", "validation_bits_per_byte", "validation_accuracy"),
    *("validation_reward", "validation_gold", "validation_kl"),
    *("tokens", "seconds", "seconds_left", "progress", "tokens_per_second", "memory"),
)
# A run that is alive is stalled when it has been silent for so many of its usual times between lines and seconds.
SILENT_LINES, SILENT_SECONDS = 20, 60.0

STEP = re.compile(r"^## Step ([0-9]{1,3}(?:,[0-9]{3}){0,5})\n", re.MULTILINE)
# What is larger is no number to draw, as is what is not finite.
MOST = 1e300

Row = dict[str, float]


@dataclass(frozen=True)
class BestOfN:
    """What best-of-n.json holds: points of each curve by its name."""

    curves: dict[str, list[dict[str, float | None]]]


class Watched:
    """The runs in a folder and below, each by a name of our own: no request names a path.

    A run may be a link. Its metrics, samples and best of n are read only where they lie in it or in the folder,
    wherever links of theirs lead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder.resolve()
        self.described: dict[str, tuple[Any, dict[str, Any]]] = {}

    def runs(self) -> dict[str, Path]:
        """Return the folders of all runs, by the names that requests call them."""
        found = run_folders(self.folder)
        return {hashlib.sha256(os.fsencode(path)).hexdigest()[:12]: path for path in found}

    def listed(self) -> list[dict[str, Any]]:
        """Return all runs at a glance; first those that were written to last."""
        runs = {path.resolve(): (name, path) for name, path in self.runs().items()}
        found = []
        for place, (name, path) in runs.items():
            each = self._describe(name, path)
            base, _ = runs.get((place.parent / (each["base"] or "")).resolve(), (None, None))
            found.append({**each, "base_run": base})
        return sorted(found, key=lambda each: (-each["updated"], each["name"]))

    def _describe(self, name: str, path: Path) -> dict[str, Any]:
        read = [self._file(path, each) for each in ("config.json", METRICS, SAMPLES, BEST_OF_N)]
        stamp = [is_written(path), *((file.stat().st_mtime_ns, file.stat().st_size) if file else None for file in read)]
        known, found = self.described.get(name, (None, {}))
        if known != stamp:
            found = self._read(path)
            self.described[name] = stamp, found
        silent = time.time() - found["updated"]
        stalled = found["state"] == "running" and silent > max(SILENT_SECONDS, SILENT_LINES * found["interval"])
        return {**found, "id": name, "silent": silent, "state": "stalled" if stalled else found["state"]}

    def _read(self, path: Path) -> dict[str, Any]:
        listed, run, parameters = read_listed(path), Run(path), None
        metrics, samples, best = (self._file(path, each) for each in (METRICS, SAMPLES, BEST_OF_N))
        rows = list(_tail(metrics)) if metrics else []
        newest: Row = {}
        for row in rows:
            newest |= row
        intervals = [after - before for before, after in pairwise(row["seconds"] for row in rows if "seconds" in row)]
        try:
            parameters = run.read_recipe().model.parameters
            curves = records.read(best, BestOfN).curves if best else {}
        except InputError:
            curves = {}
        return {
            "name": as_text(path.relative_to(self.folder)) if path != self.folder else as_text(path.absolute().name),
            "kind": listed.kind,
            "base": listed.base and as_text(listed.base),
            "parameters": parameters,
            "state": listed.state,
            "damage": as_text(listed.damage),
            "step": listed.step,
            "steps": listed.steps,
            "validated": listed.validated,
            "interval": statistics.median(intervals) if intervals else 0.0,
            "updated": (metrics or path).stat().st_mtime,
            # Where this differs, there are new samples.
            "samples": samples.stat().st_size if samples else 0,
            "best_of_n": {
                kind: [
                    {name: each for name, each in point.items() if each is not None and abs(each) < MOST}
                    for point in points
                ]
                for kind, points in curves.items()
                if kind.startswith("best of n")
            },
            "newest": {each: newest[each] for each in SHOWN if each in newest},
        }

    def _file(self, run: Path, name: str) -> Path | None:
        path = (run / name).resolve()
        inside = path.is_relative_to(self.root) or path.is_relative_to(run.resolve())
        return path if inside and path.is_file() else None

    def settings(self, name: str) -> dict[str, Any]:
        """Return all settings of a run. Raises KeyError where there is none, InputError where it is damaged."""
        return {setting: value for setting, value, _ in settings(Run(self.runs()[name]).read_recipe())}

    def samples(self, name: str) -> list[dict[str, Any]]:
        """Return what the model said at each checkpoint. Raises KeyError where there is no run of this name."""
        path = self._file(self.runs()[name], SAMPLES)
        if path is None:
            return []
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - SAMPLES_BYTES))
            parts = re.split(
                r"^## Step ([0-9]{1,3}(?:,[0-9]{3}){0,5})\n",
                file.read(SAMPLES_BYTES).decode(errors="replace"),
                flags=re.M,
            )
        # A run that was resumed may have come by the same step before.
        found = {int(step.replace(",", "")): text for step, text in zip(parts[1::2], parts[2::2], strict=True)}
        return [{"step": step, "texts": found[step].strip().split("\n\n---\n\n")} for step in sorted(found)]

    def metrics(self, name: str, start: int, tag: str, every: int) -> dict[str, Any]:
        """Return the metrics of a run from a byte on, as columns; and with what to ask for those that follow.

        `start`, `tag` and `every` are "next", "tag" and "every" of the answer before. Where the file is another one up
        to there, as after a resume, "start" is 0. A training point is the mean of `every` lines. "more" says that not
        all was read yet. Raises KeyError where there is no run of this name.
        """
        path = self._file(self.runs()[name], METRICS)
        if path is None:
            return {
                "start": 0,
                "next": 0,
                "tag": "",
                "every": 1,
                "more": False,
                "skipped": 0,
                "train": {},
                "measured": {},
            }
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < start <= size or tag != _tag(file, start):
                start, every = 0, _lines(file, size) // POINTS
            file.seek(start)
            content = file.read(CHUNK_BYTES)
            # What is longer is no line.
            end = content.rfind(b"\n") + 1 or (len(content) if len(content) == CHUNK_BYTES else 0)
            lines = content[:end].splitlines()
            found, every = list(_rows(lines)), max(every, 1)
            train, measured = ([row for row in found if ("progress" in row) == one] for one in (True, False))
            train = [_mean(train[at : at + every]) for at in range(0, len(train), every)]
            return {
                "start": start,
                "next": start + end,
                "tag": _tag(file, start + end),
                "every": every,
                "more": start + end < size and end > 0,
                "skipped": len(lines) - len(found),
                "train": _columns(train),
                "measured": _columns(measured),
            }


def as_text(name: object) -> str:
    """Return a path or a message as a text that UTF-8 can spell."""
    return os.fsencode(str(name)).decode(errors="replace")


def _tag(file: Any, end: int) -> str:
    file.seek(max(0, end - TAG_BYTES))
    return f"{zlib.crc32(file.read(min(end, TAG_BYTES))):08x}"


def _lines(file: Any, size: int) -> int:
    """Estimate how many lines a file has."""
    file.seek(size // 2)
    part = file.read(TAIL_BYTES)
    return int(size * part.count(b"\n") / max(len(part), 1))


def _tail(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        yield from _rows(file.read(TAIL_BYTES).splitlines())


def _rows(lines: Iterable[bytes]) -> Iterator[Row]:
    """Yield the finite numbers of each line that is a record of a step."""
    for line in lines:
        try:
            record = json.loads(line.decode())  # records.parse would take three times as long
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(step := record.get("step")) is int and 0 <= step < 2**53:
            numbers = ((name, each) for name, each in record.items() if type(each) in (int, float))
            yield {name: each for name, each in numbers if abs(each) < MOST}


def _mean(rows: list[Row]) -> Row:
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, each in row.items():
            values.setdefault(name, []).append(each)
    return {name: own[-1] if name in LAST else sum(own) / len(own) for name, own in values.items()}


def _columns(rows: list[Row]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_short(row.get(name)) for row in rows] for name in names}


def _short(value: float | None) -> float | None:
    return float(f"{value:.7g}") if isinstance(value, float) else value
