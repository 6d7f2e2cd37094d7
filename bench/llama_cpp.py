"""llama.cpp as a peer of `gpt bench-decode`: a llama-batched-bench that the user has, on weights that we write for it.

It reads prompts of random tokens and decodes random tokens, so that it neither samples nor hands tokens between steps.
"""

import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.harness import ending_together
from engine import gguf
from engine.errors import InputError
from engine.model import GPT
from engine.records import parse

# The seconds of the prompts and of the steps after the first token, from threads, sequences, prompt and new tokens.
Clock = Callable[[int, int, int, int], tuple[float, float]]

TRIES = 20


@contextmanager
def llama_cpp(program: Path, model: GPT, precision: str) -> Iterator[Clock]:
    """Yield a clock of the program on this model. Raises InputError where it cannot run or prints no speeds."""
    if not program.is_file():
        raise InputError(f"--llama-cpp {program} is not a file; it takes the path of llama.cpp's llama-batched-bench")
    with ending_together(), tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.gguf"
        gguf.write(model, weights, precision)
        clock = partial(run, program.absolute(), weights)
        clock(1, 1, 16, 2)
        yield clock


def run(program: Path, weights: Path, threads: int, batch: int, prompt: int, new: int) -> tuple[float, float]:
    # It prints three lines, of one step, of all steps, and of one step. The first warms up. The last may be lost or
    # come twice, and the others with it: a thread prints them, for which the program does not wait at its end.
    options = {
        "-m": weights, "-c": batch * (prompt + new), "-t": threads, "-tb": threads,
        "-npp": prompt, "-ntg": f"1,{max(new - 1, 1)},1", "-npl": batch, "--output-format": "jsonl",
    }  # fmt: skip
    command = [str(program), *(str(word) for option in options.items() for word in option)]
    for _ in range(TRIES):
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise InputError(f"--llama-cpp {program} cannot be started: {error.strerror}") from None
        lines = [*dict.fromkeys(line for line in done.stdout.splitlines() if line.startswith("{"))]
        if done.returncode or len(lines) > 1:
            break
    try:
        found = parse(lines[1])
        first, others = float(found["t_pp"]), float(found["t_tg"])
        if 0 < first < math.inf and 0 < others < math.inf:
            return first, others
    except (IndexError, KeyError, TypeError, ValueError):
        pass
    said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1][:200]
    raise InputError(
        f"--llama-cpp {program} printed no t_pp and t_tg as llama-batched-bench does; it ended with {done.returncode} "
        f"and said: {said}"
    )
