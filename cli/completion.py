"""What the shell offers for an argument or an option, after `gpt --install-completion`. Where nothing, files."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Shells read what is offered as a part of a command line. A name that would have to be quoted there is left to them.
PLAIN = re.compile(r"[\w./@%+-]+")
# The help of these names all of their values, or the usual ones.
NAMED = ("preset", "device", "precision", "checkpoint", "which", "split")
VALUES = re.compile(r"\b(nano|tiny|large|auto|cpu|cuda|fp32|bf16|fp16|int8|latest|best|train|validation|test)\b")

Offer = Callable[[str], list[str]]


def offer(name: str, kind: Any, text: str) -> Offer | None:
    """Return what completes a parameter of a command, by its name, its type and its help."""
    if name in NAMED:
        values = [*dict.fromkeys(VALUES.findall(text))]
        return lambda incomplete: values
    if name in ("data", "setting"):
        return {"data": data_names, "setting": setting_names}[name]
    # Every run but one that is yet to be made, and not the folder that holds them.
    is_run = re.search(r"\bruns?\b", text, re.IGNORECASE) and ("Path" in str(kind) or name in ("reward", "judge"))
    return run_names if is_run and name not in ("out", "tokenizer", "folder", "runs") else None


def run_names(incomplete: str) -> list[str]:
    """Return the runs in the folder that was typed so far; without one, those here and in runs."""
    inside, slash, _ = incomplete.rpartition("/")
    return [str(each) for each in (_runs(inside or "/", 2) if slash else [*_runs("runs", 3), *_runs(".", 1)])]


def _runs(folder: str, depth: int) -> Iterator[Path]:
    from engine.run import run_folders

    with contextlib.suppress(OSError):
        yield from (each for each in run_folders(Path(folder), depth) if PLAIN.fullmatch(str(each)))


def data_names(incomplete: str) -> list[str]:
    from train.data import sources

    own = (sources.STORIES, sources.STORIES_INSTRUCT, sources.STORIES_BRIEF, sources.STORIES_CHAT)
    return [*own, *sources.HUB_TEXTS, *sources.HUB_CONVERSATIONS]


def setting_names(incomplete: str) -> list[str]:
    from engine.config import Recipe, settings

    return [f"{name}=" for name, _, _ in settings(Recipe)]
