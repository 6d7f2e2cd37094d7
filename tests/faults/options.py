"""Every option of every command, at and past its bounds. They are generated: a new option needs no word here."""

import inspect
import random
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from cli.main import app
from engine.config import Recipe, bounds_of, settings
from tests.faults import child, world
from tests.faults.board import Board, changes, contents

Path_ = tuple[str, ...]

# What each command is given, so that it has little to do: the option that is tried comes last. A command without a
# line is a failure of this part.
TUNE = f"{world.TUNE} --steps 1"
ROUNDS = (
    "--device cpu --precision fp32 --rounds 1 --batch 4 --set alignment.group=2 --set alignment.answers=4 "
    "--set alignment.max_tokens=4 --set loop.samples=0 --reward reward --data chats.jsonl"
)
BENCH = "--device cpu --precision fp32 --out results"
LINES = {
    "train": f"train nano --data ready --steps 1 {world.SMALL}",
    "finetune": f"finetune base --data chats.jsonl {TUNE}",
    "reward": f"reward chat --data pairs.jsonl {TUNE}",
    "demo": "demo --short",
    "plan": "plan nano --results nowhere",
    "generate": "generate base hello --device cpu --precision fp32 --max-tokens 4",
    "chat": "chat chat --device cpu --precision fp32",
    "serve": "serve chat --port 0 --device cpu --precision fp32",
    "export": "export base",
    "import": "import hf",
    "runs": "runs .",
    "info": "info base",
    "watch": "watch . --port 0",
    "doctor": "doctor",
    "settings": "settings",
    "evaluate": "evaluate base --count 1 --tokens 100 --device cpu --precision fp32",
    "bench-train": f"bench-train nano --rounds 1 --batch 1 --context 16 {BENCH}",
    "bench-quality": "bench-quality ready --minutes 0.001 --batch 1 --device cpu",
    "bench-attention": f"bench-attention --lengths 16 --head-dim 32 --tokens 16 --only ours --causal {BENCH}",
    "bench-layernorm": f"bench-layernorm --widths 16 --rows 16 --only ours {BENCH}",
    "bench-cross-entropy": f"bench-cross-entropy --vocab 4096 --tokens 16 --rounds 1 {BENCH}",
    "bench-decode": f"bench-decode nano --batch 1 --rounds 1 --only ours {BENCH}",
    "bench-decode-attention": f"bench-decode-attention --batch 1 --keys 16 --head-dim 16 --group 1 --only ours {BENCH}",
    "bench-serving": "bench-serving chat --seconds 1 --clients 1 --out results",
    "bench-compile": "bench-compile --dtype fp32",
    "rlhf ppo": f"rlhf ppo chat {ROUNDS}",
    "rlhf grpo": f"rlhf grpo chat {ROUNDS}",
    "rlhf dpo": f"rlhf dpo chat --data pairs.jsonl {TUNE}",
    "rlhf best-of-n": "rlhf best-of-n chat --reward reward --data chats.jsonl --count 1 --prompts 2 --device cpu",
    "rlhf pairs": "rlhf pairs chat --prompts 40 --judge reward --data chats.jsonl --device cpu --precision fp32",
    "data prepare": "data prepare words.txt --vocab-size 320 --workers 1",
    "data show": "data show ready",
    "tokenizer train": "tokenizer train --data words.txt --vocab-size 320",
    "tokenizer show": "tokenizer show tokenizer.model",
}
# These go on until they are told to end.
SERVERS = (("serve",), ("watch",))
# These write into a folder or file that has to be named where it is not what is tried.
OUT = {
    *("train", "finetune", "reward", "demo", "export", "import", "rlhf ppo", "rlhf grpo", "rlhf dpo"),
    *("data prepare", "tokenizer train"),
}
# A command is told to end after this many seconds: it may have been asked for more work than that.
SECONDS = 4.0
# An option that many commands share is tried with all values in one of them, and with this many in each other one.
SOME = 2
LINE = "the line itself"
HUGE = (2**31, 2**63, 10**30)
TEXTS = ("", " ", "x" * 300, "caf\u00e9 \u2603", "a=b=c", "\x1b[31m", "-", "none", "[", "1")
PATHS = ("", ".", "missing/deep", "words.txt", "base", "/dev/null", "x" * 300, "words.txt/below", "caf\u00e9 \u2603")
GROUPS = ("loop.", "model.", "data.", "optimizer.", "schedule.")


def commands(of: Any = app, path: Path_ = ()) -> Iterator[tuple[Path_, Callable[..., Any]]]:
    """Yield every command: its words, and the function whose parameters Typer shows."""
    for info in of.registered_commands:
        yield (*path, info.name or info.callback.__name__.replace("_", "-")), info.callback
    for group in of.registered_groups:
        yield from commands(group.typer_instance, (*path, group.name))


def values(kind: Any, marks: list[Any]) -> list[str | None]:
    """Return the values to try: at the bounds, next to them, far from them, and of no such type. None is a flag's."""
    kinds = [each for each in (typing.get_args(kind) or (kind,)) if each is not type(None)]
    kind = typing.get_args(kinds[0])[0] if typing.get_origin(kinds[0]) is list else kinds[0]
    if kind is bool:
        return [None]
    texts = [mark for mark in marks if isinstance(mark, str)]
    texts = [bound for mark in texts for bound in ([mark] if " " in mark else bounds_of(mark))]
    bounds = [float(each) for text in texts for each in re.findall(r"(?:at least|above|at most|below) (\S+)", text)]
    if kind is int:
        near = [int(bound) + step for bound in bounds for step in (-1, 0, 1)]
        return [*dict.fromkeys(map(str, (*near, -1, 0, 1, *HUGE, -(2**63)))), "1.5", "x", "", "nan", "1" * 5000]
    if kind is float:
        close = [bound * (1 + step) + step for bound in bounds for step in (-1e-9, 0, 1e-9)]
        return [*dict.fromkeys(map(repr, (*close, -1.0, 0.0, 1e-300, 1.0, 1e308))), "inf", "-inf", "nan", "x", ""]
    if kind is Path:
        return list(PATHS)
    if kind is str:
        return list(TEXTS)
    raise TypeError(f"{kind}: how is an option of this type tried?")


def plans(seed: int) -> Iterator[tuple[Path_, list[str], str]]:
    """Yield every case: the command, its words, and the name of what is tried."""
    seen: set[tuple[str, Any]] = set()
    draw = random.Random(f"options {seed}")
    for path, command in commands():
        known = LINES.get(" ".join(path))
        for name, parameter in inspect.signature(command).parameters.items():
            kind, *marks = typing.get_args(parameter.annotation) or (parameter.annotation,)
            info = next((mark for mark in marks if hasattr(mark, "param_decls")), None)
            if info is None:
                raise TypeError(f"gpt {' '.join(path)}: {name} is neither an option nor an argument")
            argument = isinstance(info, typer.models.ArgumentInfo)
            long = next(
                (each for each in info.param_decls or () if each.startswith("--")), f"--{name.replace('_', '-')}"
            )
            tried = values(kind, marks)
            if (long, info.help) in seen:
                tried = draw.sample(tried, min(SOME, len(tried)))
            seen.add((long, info.help))
            for value in tried:
                yield path, words(path, known or " ".join(path), name if argument else long, value, argument), long
        yield path, [*known.split(), *_out(path, "")] if known else [], LINE
    for name, _, _ in settings(Recipe):
        for text in ("0", "-1", "1", "1e308", "nan", "x", "", "99999999999999999999"):
            yield ("plan",), [*LINES["plan"].split(), "--set", f"{name}={text}"], name
        for text in ("0", "1e308") if name.startswith(GROUPS) else ():
            yield ("train",), [*LINES["train"].split(), "--out", "new", "--set", f"{name}={text}"], name


def words(path: Path_, line: str, name: str, value: str | None, argument: bool) -> list[str]:
    """Return the command line with one value put in."""
    given = line.split()
    if argument:
        # The arguments stand between the command's name and its first option, in the order of the function.
        positional = [each for each, _ in arguments(path)]
        at = len(path) + positional.index(name)
        first = next((number for number, word in enumerate(given) if word.startswith("--")), len(given))
        head = given[:first] + ["1"] * (at - first)
        return [*head[:at], str(value), *head[at + 1 :], *given[first:], *_out(path, name)]
    if name in ("--steps", "--tokens", "--epochs", "--minutes") and "--steps" in given:
        at = given.index("--steps")
        del given[at : at + 2]
    return [*given, *_out(path, name), name, *([] if value is None else [value])]


def arguments(path: Path_) -> list[tuple[str, Any]]:
    command = dict(commands())[path]
    found = []
    for name, parameter in inspect.signature(command).parameters.items():
        marks = typing.get_args(parameter.annotation)[1:]
        if any(isinstance(mark, typer.models.ArgumentInfo) for mark in marks):
            found.append((name, parameter))
    return found


def _out(path: Path_, name: str) -> list[str]:
    return ["--out", "new"] if " ".join(path) in OUT and name != "--out" else []


def run(board: Board) -> None:
    tried = list(plans(board.seed))
    for case in board.cases(len(tried)):
        path, given, name = tried[case.number]
        case.what = f"gpt {' '.join(each if len(each) < 80 else each[:40] + '...' for each in given)}"
        if not given:
            case.fail("unnamed", f"gpt {' '.join(path)} has no line in tests/faults/options.py")
            continue
        with child.copied(board.world, case.folder / "w") as here:
            before = contents(here)
            until = "http://" if path in SERVERS else None
            done = child.run(child.gpt(*given), here, SECONDS, until=until)
            case.judge(done)
            if name == LINE and done.code not in (0, 128 + 15) and not done.stopped:
                case.fail("unnamed", f"a line of tests/faults/options.py is refused: {done.said}")
            if done.stopped and path not in SERVERS:
                board.note("told to end after its time")
            if done.code == 2 and (left := changes(before, contents(here))):
                case.fail("left behind", f"{', '.join(left[:5])}: {done.said}")
