"""Try to break it: python -m tests.faults [--only PART] [--seed N] [--case N] [--share X] [--out FOLDER]"""

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports torch: forked processes have one thread each, and the kernels run interpreted nowhere.
if __name__ == "__main__":
    os.environ.update(
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="PASSIVE",
        HF_HUB_OFFLINE="1",
        WANDB_MODE="offline",
        COLUMNS="400",
        GPT_TRACEBACK="1",
    )

from tests.faults import child, world
from tests.faults.board import KINDS, Board, Failure

# Each part: the module and function that drive it, what it tries, and whether it needs the machine for itself.
PARTS: dict[str, tuple[str, str, bool]] = {
    "options": ("options.run", "every option of every command at and past its bounds", False),
    "json": ("damage.json_files", "changed JSON files of ours", False),
    "flips": ("damage.flips", "single bits of config.json and of the tokenizer", False),
    "checkpoints": ("damage.checkpoints", "damaged checkpoints", False),
    "kills": ("kills.run", "kill -9 while training, saving, preparing, exporting", False),
    "data": ("odd_files.run", "odd files in every command that reads data", False),
    "parsers": ("parsers.run", "parsers, by hypothesis", False),
    "api": ("api.run", "requests made from the API's own schema", False),
    "disk": ("disk.run", "a disk that fills", False),
    "writers": ("writers.run", "two writers in one folder", False),
    "signals": ("signals.run", "signals at random moments", False),
    "overwrite": ("overwrite.run", "--overwrite of what gpt did not make", False),
    "clients": ("clients.run", "256 and 600 clients, slow, silent and leaving", True),
}

SCRATCH_BYTES = 2**30


@dataclasses.dataclass
class Row:
    """What came of one part."""

    part: str
    cases: int = 0
    seconds: float = 0.0
    skipped: str = ""
    failures: list[Failure] = dataclasses.field(default_factory=list)
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def count(self, kind: str) -> int:
        return sum(failure.kind == kind for failure in self.failures)


def load(part: str) -> tuple[Any, Callable[[Board], None]]:
    name, _, function = PARTS[part][0].partition(".")
    module = importlib.import_module(f"tests.faults.{name}")
    return module, getattr(module, function)


def try_part(job: tuple[str, dict[str, Any]]) -> Row:
    part, options = job
    module, run = load(part)
    if why := getattr(module, "unavailable", str)():
        return Row(part, skipped=why)
    board, begin = Board(part, **options), time.monotonic()
    run(board)
    return Row(part, board.tried, time.monotonic() - begin, "", board.failures, board.notes, board.figures)


def try_all(parts: list[str], workers: int, options: dict[str, Any]) -> dict[str, Row]:
    """Run parts, each dealt out to all workers; those that want the machine for themselves come last, one by one."""
    rows = {part: Row(part) for part in parts}
    shared = [part for part in parts if not PARTS[part][2]]
    jobs = [(part, {**options, "worker": worker, "workers": workers}) for part in shared for worker in range(workers)]
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        found = [*pool.imap_unordered(try_part, jobs, 1)]
    found += [try_part((part, options)) for part in parts if PARTS[part][2]]
    for each in found:
        row = rows[each.part]
        row.cases += each.cases
        row.seconds += each.seconds
        row.skipped = row.skipped or each.skipped
        row.failures += each.failures
        row.notes += each.notes
        row.figures |= each.figures
    return rows


def table(*lines: list[object]) -> None:
    """Print lines, the first of which is the heading, as a README has them."""
    for number, cells in enumerate(lines):
        print("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |")
        if number == 0:
            print("|" + "---|" * len(cells))
    print()


def show(rows: dict[str, Row], seed: int) -> None:
    """Print two tables: the cases, and the failures; then each sort of failure with the command that repeats it."""
    tried, total = list(rows.values()), sum(row.cases for row in rows.values())
    table(
        ["part", "what was tried", "cases", "seconds"],
        *([row.part, row.skipped or PARTS[row.part][1], row.cases, round(row.seconds)] for row in tried),
        ["in all", "", total, round(sum(row.seconds for row in tried))],
    )
    table(
        ["failures", *KINDS],
        *([row.part, *map(row.count, KINDS)] for row in tried),
        ["in all", *(sum(row.count(kind) for row in tried) for kind in KINDS)],
    )
    for row in rows.values():
        sorts: dict[tuple[str, str], list[Failure]] = {}
        for failure in sorted(row.failures, key=lambda each: each.case):
            sorts.setdefault(failure.sort, []).append(failure)
        for (kind, _), (first, *others) in sorted(sorts.items(), key=lambda each: (each[0][0], -len(each[1]))):
            print(f"\n{row.part}, {kind}, {len(others) + 1} like this: {first.what}\n    {first.repeat(seed)}")
            if others:
                print(f"    and --case {', '.join(str(each.case) for each in others[:12])}")
            print("    " + first.saw.replace("\n", "\n    "))
        for note, count in (*row.notes.items(), *row.figures.items()):
            print(f"{row.part}: {note}: {count}")


def write(rows: dict[str, Row], seed: int, out: Path) -> Path:
    from bench.harness import device_name
    from engine.run import versions
    from engine.runtime import choose

    content = {
        "device": device_name(choose("cpu", "fp32")),
        "versions": versions(),
        "seed": seed,
        "parts": {
            row.part: {
                "what": PARTS[row.part][1],
                "cases": row.cases,
                "seconds": round(row.seconds, 1),
                **({"skipped": row.skipped} if row.skipped else {}),
                "failures": {kind: row.count(kind) for kind in KINDS},
                **({"notes": dict(row.notes)} if row.notes else {}),
                **({"figures": row.figures} if row.figures else {}),
            }
            for row in rows.values()
        },
        "failed": [
            # What was seen holds paths of this machine; to repeat the case shows it again.
            {"part": failure.part, "kind": failure.kind, "what": failure.what, "repeat": failure.repeat(seed)}
            for row in rows.values()
            for failure in row.failures
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / "faults.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="one case of one part, by its number")
    parser.add_argument("--share", type=float, default=1.0, help="try this share of the cases")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    asked = parser.parse_args()
    if asked.case is not None and len(asked.only or ()) != 1:
        parser.error("--case needs --only PART")
    begin = time.monotonic()
    child.preload()
    # In memory where there is room: kill -9 loses nothing that was written, and thousands of cases wait for no disk.
    quick = Path("/dev/shm")
    room = quick.is_dir() and shutil.disk_usage(quick).free > SCRATCH_BYTES
    scratch = Path(tempfile.mkdtemp(prefix="gpt-faults-", dir=quick if room else None))
    try:
        made = world.make(scratch / "world")
        options = {"seed": asked.seed, "scratch": scratch, "world": made, "only": asked.case, "share": asked.share}
        rows = try_all(asked.only or list(PARTS), asked.workers, options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    show(rows, asked.seed)
    if asked.case is None:
        print(f"\nwritten to {write(rows, asked.seed, asked.out)} after {time.monotonic() - begin:.0f} s")
    return int(any(row.failures for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
