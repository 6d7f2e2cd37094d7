"""Everything that wants a GPU, from the tree, in steps: what is right first, then how fast it is, most valuable first.

    bash bench/gpu_all.sh FOLDER [STEP...]        (once, and the same once more; --help has the names of the steps)

GPUs are lent for minutes: a call ends after six (--seconds), and can be cut anywhere. The next one goes on with what
has not ended yet on this device; then it does again what ended with other code, first what failed. gpu_all.jsonl says
what has ended, in FOLDER or in bench/results of the tree: where the second call meets an empty machine, put what came
back of FOLDER into bench/results before. A step that ran out of its own time goes to the end of the queue, and has
longer there. Steps that are named run whatever is written down. What a step writes (JSON as it goes, plots, log.txt)
lies in FOLDER/STEP-N, with N from 1.

Nothing but Python and torch is needed to start. The exit status is 0 once all steps have ended well.
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "engine", "train", "rlhf", "bench", "cli", "tests")
RESULTS = ROOT / "bench" / "results"
PYTHON = sys.executable
MARKS = "gpu_all.jsonl"
# A step that has fewer seconds left is not begun; an interrupted one has this long to say what it had.
LEAST, GRACE = 20, 5
PACKAGES = "torch triton safetensors sentencepiece pydantic typer rich matplotlib pytest hypothesis xdist transformers"
PROBE = """import torch
torch.ones(1, device="cuda").item()
print(torch.cuda.get_device_name() + ", torch " + torch.__version__)"""

Mark = dict[str, Any]


@dataclass(frozen=True)
class Step:
    name: str
    seconds: int  # its own limit, about twice what it should take
    command: str  # behind `python -m`; {out} is its folder, {workers} what spreads tests over the cores

    def arguments(self, out: Path) -> list[str]:
        # Most of the tests' time is Triton compiling: one process for each core, up to sixteen. Where a kernel does not
        # come to its end, that process is replaced.
        spread = f"-n {min(os.cpu_count() or 1, 16)} -o faulthandler_timeout=60 -o faulthandler_exit_on_timeout=true"
        spread = spread if importlib.util.find_spec("xdist") else ""
        return shlex.split(self.command.format(out=shlex.quote(str(out)), workers=spread))


def tuning(head_dim: int) -> Iterator[Step]:
    """Yield a step for each kernel; backward is what misses its target by most."""
    for kernel in ("keys", "forward", "queries"):
        command = f"cli bench-attention --tune --head-dim {head_dim} --only {kernel} --out {{out}}"
        yield Step(f"tune-{head_dim}-{kernel}", 100, command)


QUICK = "--only ours,flash,cudnn --out {out}"
TRAIN = "--rounds 5 --compile --out {out}"
STEPS = (
    # The first call. -vv, since the project's own options hold a -q: the log names each test as it ends.
    Step("tests-kernels", 190, "pytest tests/kernels -vv --tb=short {workers}"),
    Step("tests-gpu", 60, "pytest tests/engine tests/bench -m gpu -vv --tb=short --continue-on-collection-errors"),
    Step("attention", 80, f"cli bench-attention --head-dim 64,128 --causal --lengths 4096,1024,16384,512 {QUICK}"),
    Step("train-tiny", 110, f"cli bench-train tiny --batch 178 {TRAIN}"),
    Step("train-large", 150, f"cli bench-train large --batch 30 {TRAIN}"),
    Step("decode-large", 50, "cli bench-decode large --only ours --rounds 3 --out {out}"),
    # The second: what no GPU has measured yet, ...
    Step("train-nano", 90, "cli train nano --steps 100 --device cuda --out {out}/run"),
    *tuning(128),
    Step("attention-32", 60, f"cli bench-attention --head-dim 32 {QUICK}"),
    *tuning(32),
    Step("layernorm-wide", 50, "cli bench-layernorm --widths 1024,2048,4096 --out {out}"),
    Step("rmsnorm", 50, "cli bench-layernorm --rms --widths 576,960,1024,2048 --out {out}"),
    Step("attention-full", 60, f"cli bench-attention --head-dim 64,128 --full {QUICK}"),
    Step("attention-plain", 40, "cli bench-attention --head-dim 64,128 --lengths 4096 --only ours,plain --out {out}"),
    Step("train-large-2048", 200, f"cli bench-train large --batch 8 --context 2048 {TRAIN}"),
    Step("decode-peers", 120, "cli bench-decode large --batch 1,8 --rounds 1 --out {out}"),
    # ... then what is known and may have changed. flex is compiled for every length, which takes longer than all else.
    *tuning(64),
    Step("decode-attention", 60, "cli bench-decode-attention --only ours,paged,flash --out {out}"),
    Step("cross-entropy", 50, "cli bench-cross-entropy --out {out}"),
    Step("layernorm", 50, "cli bench-layernorm --widths 256,512,768 --out {out}"),
    Step("attention-flex", 90, "cli bench-attention --head-dim 64 --lengths 4096,1024 --only ours,flex --out {out}"),
)  # fmt: skip


def code() -> str:
    """Return a hash of all Python files: the commit says "dirty" as soon as results lie in the tree."""
    files = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()[:16]


def marks(folders: Sequence[Path], about: Mark) -> list[Mark]:
    """Return what was written down that holds all of `about`; a line that was cut is none."""
    files = [folder / MARKS for folder in folders if (folder / MARKS).exists()]
    found = []
    # A line that is in both is one.
    for line in dict.fromkeys(line for file in files for line in file.read_text(errors="replace").splitlines()):
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [mark for mark in found if isinstance(mark, dict) and about.items() <= mark.items()]


def remaining(past: Sequence[Mark], named: Sequence[str], code: str) -> list[Step]:
    """Return the steps that are to run: what has never ended, then what failed with other code, then what passed.

    Among equals, those that ran out of their own time come last.
    """
    ended = {mark["step"]: mark for mark in past if "exit" in mark}
    cut = Counter(mark["step"] for mark in past if "out_of_time" in mark)
    done = {name for name, mark in ended.items() if mark.get("code") == code}
    wanted = [step for step in STEPS if step.name in named or (not named and step.name not in done)]

    def order(step: Step) -> tuple[int, int]:
        before = ended.get(step.name)
        return 0 if before is None else 2 if before["exit"] == 0 else 1, cut[step.name]

    return sorted(wanted, key=order)


def run(arguments: Sequence[str], log: Path, seconds: float) -> int | None:
    """Return its exit status, or None where it took longer. None of its processes is left, whatever happens."""

    def before_it_starts() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends even where this process is killed
        # What a script has started with & ignores it, and would hand that on.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    # Into a file: a pipe would stay open for as long as anything that pytest or Triton has started lives.
    with log.open("wb") as output:
        process = subprocess.Popen(
            [PYTHON, "-m", *arguments], cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=before_it_starts,
        )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # interrupted, pytest still shows what has failed so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)  # what hangs in the driver cannot be killed


def device() -> str | None:
    """Return the device's name, where it computes, and torch's version."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run([PYTHON, "-c", PROBE], capture_output=True, text=True, timeout=60)
        return done.stdout.strip() or None
    return None


def call(folder: Path, about: Mark, named: Sequence[str], end: float) -> Iterator[Mark]:
    """Run steps until the time is up, and yield a mark of each. Raises ConnectionError when the device is gone."""
    past = marks([folder, RESULTS], {"device": about["device"]})
    for step in remaining(past, named, about["code"]):
        if (left := end - time.monotonic() - GRACE) < LEAST:
            return
        mine = [mark for mark in past if mark["step"] == step.name]
        begun = sum("begun" in mark for mark in mine)
        out = folder / f"{step.name}-{begun + 1}"
        out.mkdir(exist_ok=True)
        mark = {**about, "step": step.name, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
        write(folder, {**mark, "begun": begun + 1})
        limit = step.seconds * (1 + sum("out_of_time" in mark for mark in mine))
        print(f"== {out.name}, at most {min(limit, left):.0f} s: {step.command}", flush=True)
        began = time.monotonic()
        status = run(step.arguments(out), out / "log.txt", min(limit, left))
        log = (out / "log.txt").read_text(errors="replace")
        if tests := Counter(re.findall(r"\[ *\d+%\] ([A-Z]+) tests/|tests/.+ ([A-Z]+) +\[ *\d+%\]", log)):
            mark["tests"] = {"".join(which): count for which, count in tests.items()}
        mark["seconds"] = round(time.monotonic() - began, 1)
        print("\n".join(log.splitlines()[-8:]), flush=True)
        out_of_time = status is None and limit <= left
        if (status or out_of_time) and device() is None:
            raise ConnectionError(f"the device is gone: {step.name} will be run again")
        if status is None and "[100%]" in log:
            status = -1  # all tests have ended, but pytest has not
        if status is not None:
            mark["exit"] = status
        elif out_of_time:
            mark["out_of_time"] = limit
        write(folder, mark)
        yield mark


def write(folder: Path, mark: Mark) -> None:
    with (folder / MARKS).open("a") as file:
        file.write(f"\n{json.dumps(mark)}\n")  # a line of its own, whatever was cut before it


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "bench.gpu_all", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(step.name for step in STEPS))
    parser.add_argument("--seconds", type=float, default=360)
    given = parser.parse_args(arguments)
    if unknown := set(given.steps) - {step.name for step in STEPS}:
        parser.error(f"no step is called {', '.join(unknown)}")
    end = time.monotonic() + given.seconds
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if missing := [name for name in PACKAGES.split() if importlib.util.find_spec(name) is None]:
        print(f"MISSING Python packages: {', '.join(missing)}")
    if (name := device()) is None:
        print(f"there is no CUDA device on which torch computes: try `{PYTHON} -c '{PROBE}'`", file=sys.stderr)
        return 2
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    about = {"device": name, "code": code()}
    print(f"{name}, code {about['code']}", flush=True)
    try:
        for mark in call(folder, about, given.steps, end):
            print(f"{mark['step']}: {how(mark)}\n", flush=True)
    except ConnectionError as error:
        print(error, file=sys.stderr)
    past = marks([folder, RESULTS], about)
    last = {mark["step"]: mark for mark in past if "seconds" in mark}
    for step in STEPS:
        print(f"{step.name:20} {how(last[step.name]) if step.name in last else '-'}")
    return 0 if all(last.get(step.name, {}).get("exit") == 0 for step in STEPS) else 1


def how(mark: Mark) -> str:
    ended = f"exit {mark['exit']}" if "exit" in mark else "out of its time" if "out_of_time" in mark else "cut"
    return f"{ended} after {mark['seconds']} s" + "".join(
        f", {n} {which}" for which, n in mark.get("tests", {}).items()
    )


if __name__ == "__main__":
    sys.exit(main())
