"""What other people's tools make of ours. What is in this file, their scripts import: the standard library alone."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def tried(what: str) -> Iterator[Callable[[str], None]]:
    """Print how a block went: `ok`, with what it says through the function that it is given, or how it failed."""
    said: list[str] = []
    try:
        yield said.append
        result = ": ".join(("ok", *said))
    except Exception as error:
        result = f"failed: {type(error).__name__}: {error}"[:500]
    print(json.dumps({"tried": what, "result": result}), flush=True)


def gpt(*arguments: str) -> str:
    """Return what a command of ours prints. Raises RuntimeError where it fails."""
    return _project("cli", *arguments)


def ours(run: str, **questions: Any) -> Any:
    """Return what our own model and tokenizer of a run say: `questions` and answers are told in ours.py."""
    return json.loads(_project("bench.compatibility.ours", run, said=json.dumps(questions)))


def _project(*words: str, said: str = "") -> str:
    # From this folder the project's packages are found, by the interpreter that has what they import.
    command = [os.environ["PYTHON"], "-m", *words]
    done = subprocess.run(command, input=said, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:200]} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout
