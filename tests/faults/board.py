"""The board on which a part writes its cases and failures. A case is known by part, seed and number, and so repeats."""

import hashlib
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.child import RUNAWAY, Done

# The ways in which a case can fail; "unnamed" is an error that does not say what it is about.
KINDS = ("wrong load", "lost", "traceback", "hang", "5xx", "left behind", "unnamed")
TRACEBACK = re.compile(r"^Traceback \(most recent call last\)|^error: a bug of gpt", re.MULTILINE)
RAISED = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Failure)\w*: .*$", re.MULTILINE)
# Exit codes that a command may have: success, training or a check that failed, bad input, or stopped by a signal.
ORDERLY = {0, 1, 2, *(128 + number for number in (1, 2, 10, 15))}


@dataclass(frozen=True)
class Failure:
    part: str
    kind: str
    case: int
    what: str  # the case in words
    saw: str  # what came

    @property
    def sort(self) -> tuple[str, str]:
        """Failures of one sort are alike but for their numbers and names: they are shown together."""
        line = next(iter(RAISED.findall(self.saw)), self.saw.rpartition("\n")[2])
        return self.kind, re.sub(r"[\d'\"/].*", "", line)[:60]

    def repeat(self, seed: int) -> str:
        return f"python -m tests.faults --only {self.part} --seed {seed} --case {self.case}"


@dataclass
class Case:
    board: "Board"
    number: int
    random: random.Random
    folder: Path
    what: str = ""

    def fail(self, kind: str, saw: str) -> None:
        assert kind in KINDS
        # What was raised, and the end of what was said.
        raised = "\n".join(line[:200] for line in RAISED.findall(saw)[-2:])
        shown = f"{raised}\n... {saw.strip()[-300:]}" if raised and len(saw) > 600 else saw.strip()[-600:]
        self.board.failures.append(Failure(self.board.part, kind, self.number, self.what, shown))

    def judge(self, done: Done, named: Sequence[str] = ()) -> None:
        """What holds for every command: an orderly end, no traceback, no hang; an error names one of `named`."""
        if done.hung:
            self.fail("hang", done.said)
        elif TRACEBACK.search(done.said) or done.code == RUNAWAY:
            self.fail("traceback", done.said)
        elif done.code not in ORDERLY and not done.stopped:
            self.fail("traceback", f"exit code {done.code}: {done.said}")
        elif done.code == 2 and not any(name in done.said.replace("\n", "") for name in named or ("rror",)):
            self.fail("unnamed", f"exit code 2 names none of {', '.join(named) or 'an error'}: {done.said}")
        if done.left:
            self.fail("left behind", f"{done.left} processes outlived the command: {done.said}")

    def told(self, done: Done) -> None:
        """Take over the failures that a case has printed itself: FAIL, the kind, and what it saw."""
        for line in done.out.splitlines():
            if line.startswith("FAIL "):
                kind, _, saw = line.removeprefix("FAIL ").partition(": ")
                self.fail(kind, saw)


@dataclass
class Board:
    """The cases and failures of one part. One of `workers` takes the cases whose turn is `worker`."""

    part: str
    seed: int
    scratch: Path
    world: Path
    only: int | None = None
    share: float = 1.0
    worker: int = 0
    workers: int = 1
    tried: int = 0
    failures: list[Failure] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    figures: dict[str, float] = field(default_factory=dict)

    def cases(self, count: int) -> Iterator[Case]:
        """Yield `count` cases, less where a share was asked for. Each has its own random numbers and folder."""
        for number in range(count):
            if self.only not in (None, number) or number % self.workers != self.worker:
                continue
            if self.only is None and random.Random(f"share {self.seed} {self.part} {number}").random() >= self.share:
                continue
            folder = self.scratch / f"{self.part}-{number}"
            folder.mkdir(parents=True)
            self.tried += 1
            yield Case(self, number, random.Random(f"{self.seed} {self.part} {number}"), folder)
            shutil.rmtree(folder, ignore_errors=True)

    def note(self, what: str) -> None:
        self.notes[what] += 1


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder, and what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path.relative_to(folder))] = str(path.readlink()) if path.is_symlink() else "folder"
    return found


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
