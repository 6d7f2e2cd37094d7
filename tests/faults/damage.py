"""Damaged files: a fault is found and named, or what is loaded is what it was. Other output is a wrong load."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import child, world
from tests.faults.board import Board, Case

CHECKPOINTS = 500
OF_EACH_JSON = 500
FLIPS = 2000
# Our own JSON files, and the commands that read them: what they say of an undamaged file is what they may say.
JSON_FILES = {
    "base/config.json": [world.text_of("base"), "info base"],
    "base/checkpoints/{new}/manifest.json": [world.text_of("base"), "info base"],
    "base/checkpoints/{new}/state.json": [world.text_of("base"), "train nano --out base --resume --steps 5"],
    "base/checkpoints/{new}/evaluation.json": ["info base", f"{world.text_of('base')} --checkpoint best"],
    "base/metrics.jsonl": ["info base", "train nano --out base --resume --steps 5"],
    "ready/train/index.json": [
        "data show ready --verify",
        f"train nano --data ready --out new --steps 1 {world.SMALL}",
    ],
    "hf/config.json": ["import hf --out new"],
}


def flip(content: bytes, draw: random.Random) -> bytes:
    """Change one bit."""
    if not content:
        return b"\0"
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def zeros(content: bytes, draw: random.Random) -> bytes:
    """A block that never came to the disk."""
    begin = draw.randrange(len(content) + 1)
    end = min(len(content), begin + draw.choice((1, 16, 512, 4096)))
    return content[:begin] + b"\0" * (end - begin) + content[end:]


def longer(content: bytes, draw: random.Random) -> bytes:
    return content + draw.choice((b"\0", b"\n", b"{}", content))


def swapped(content: bytes, draw: random.Random) -> bytes:
    """Two blocks in each other's place."""
    size = max(1, len(content) // 8)
    one, other = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    moved = bytearray(content)
    moved[one : one + size], moved[other : other + size] = content[other : other + size], content[one : one + size]
    return bytes(moved)


BYTES: list[Callable[[bytes, random.Random], bytes]] = [flip, flip, cut, zeros, longer, swapped]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "", "x", "1", "../.."),
    *([], [[]], {}, {"a": 1}, ["x"], [1, 2], {"": None}),
]


def changed_json(content: bytes, draw: random.Random) -> bytes:
    """Change one place of a JSON file, or of one of its lines: a value, a name, a type, a level."""
    lines = content.split(b"\n") if content[:1] == b"{" and content.count(b"\n{") else [content]
    at = draw.randrange(len(lines))
    try:
        tree = json.loads(lines[at])
    except ValueError:
        return flip(content, draw)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(tree)
    if not places:
        return draw.choice((b"[]", b"1", b"null"))
    node, key = draw.choice(places)
    how = draw.randrange(6)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[f"{key}_"] = node.pop(key)
    elif how == 2:
        node[key] = [node[key]]
    elif how == 3 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = draw.choice((node[key] + 1, node[key] * 2, -node[key], node[key] / 2, str(node[key])))
    elif how == 4 and draw.random() < 0.2:
        deep = "[" * 5000 + "]" * 5000
        return json.dumps(tree).encode().replace(json.dumps(node[key]).encode(), deep.encode(), 1)
    else:
        node[key] = draw.choice(ODD_VALUES)
    lines[at] = json.dumps(tree).encode() if draw.random() < 0.9 else json.dumps(tree).encode("utf-16")
    return b"\n".join(lines)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def fingerprint(folder: str) -> Callable[[], None]:
    """The work that loads a run as generation does, and prints a number for all that it could then say."""

    def load(**_: str) -> None:
        import torch

        from cli.console import notice
        from engine.run import Run
        from engine.runtime import choose

        model, tokenizer = Run(Path(folder)).load_model(choose("cpu", "fp32"), "latest", notice)
        ids = torch.arange(2 * 16).reshape(2, 16) % model.config.vocab_size
        with torch.no_grad():
            scores = model.logits(model(ids))
        texts = tokenizer.encode_batch(world.documents()[:20])
        said = repr((tokenizer.token_bytes, tokenizer.special, texts, model.config.context)).encode()
        print(hashlib.sha256(scores.double().numpy().tobytes() + said).hexdigest())

    def work() -> None:
        import cli.main

        # What a command raises is made a sentence and an exit code by the door of `gpt`.
        cli.main.app = load  # type: ignore[assignment]
        cli.main.main()

    return work


def damage(case: Case, file: Path, how: Callable[[bytes, random.Random], bytes]) -> bool:
    """Damage a file in one way. Return whether that changed anything."""
    before = file.read_bytes()
    after = how(before, case.random)
    file.write_bytes(after)
    return before != after


def checkpoints(board: Board) -> None:
    """500 damaged checkpoints: the newest is damaged, an older one is whole."""
    with child.copied(board.world, board.scratch / f"good-{board.worker}") as here:
        new = child.run(fingerprint("base"), here).out.strip()
        shutil.rmtree(newest(here / "base"))
        old = child.run(fingerprint("base"), here).out.strip()
    for case in board.cases(CHECKPOINTS):
        with child.copied(board.world, case.folder / "w") as here:
            target = newest(here / "base")
            file = case.random.choice(sorted(target.iterdir()))
            how: Any = case.random.choice([*BYTES, "gone", "folder", "of the older one"])
            name = how if isinstance(how, str) else how.__name__
            case.what = f"base/checkpoints/{target.name}/{file.name}: {name}"
            older = min((here / "base" / "checkpoints").glob("step-*")) / file.name
            if not isinstance(how, str):
                damage(case, file, how)
            elif how == "of the older one" and older.is_file():
                shutil.copy(older, file)
            else:
                file.unlink()
                if how == "folder":
                    file.mkdir()
            done = child.run(fingerprint("base"), here, 30)
            case.judge(done, (file.name, target.name))
            if done.code == 0 and not (
                done.out.strip() == new or (done.out.strip() == old and target.name in done.err)
            ):
                case.fail("wrong load", f"other output without a word: {done.said}")


def json_files(board: Board) -> None:
    """500 of each of our JSON files, changed as bytes and as trees."""
    with child.copied(board.world, board.scratch / f"good-{board.worker}") as here:
        new = newest(here / "base").name
        right: dict[str, str] = {}
    names = sorted(JSON_FILES)
    for case in board.cases(OF_EACH_JSON * len(names)):
        name = names[case.number % len(names)]
        command = case.random.choice(JSON_FILES[name])
        if command not in right:
            with child.copied(board.world, board.scratch / f"good-{board.worker}") as here:
                right[command] = child.run(child.gpt(*command.split()), here).out
        with child.copied(board.world, case.folder / "w") as here:
            file = here / name.format(new=new)
            how = case.random.choice([changed_json, changed_json, changed_json, *BYTES])
            if not damage(case, file, how):
                continue
            case.what = f"{name}, {how.__name__}, then gpt {command}"
            done = child.run(child.gpt(*command.split()), here, 30)
            case.judge(done, (file.name, file.parent.name, "--resume"))
            if command.startswith("generate") and done.code == 0 and done.out != right[command] and not done.err:
                case.fail("wrong load", f"other text in silence: {done.said}")


def flips(board: Board) -> None:
    """2,000 single bits, of config.json and of the tokenizer."""
    with child.copied(board.world, board.scratch / f"good-{board.worker}") as here:
        right = child.run(fingerprint("base"), here).out.strip()
    for case in board.cases(FLIPS):
        name = ("config.json", "tokenizer.model")[case.number % 2]
        case.what = f"one bit of base/{name}"
        with child.copied(board.world, case.folder / "w") as here:
            damage(case, here / "base" / name, flip)
            done = child.run(fingerprint("base"), here, 30)
            # A model setting that does not fit the weights is the config's fault, whichever file the message names.
            case.judge(done, ("base",))
            if done.code == 0 and done.out.strip() != right:
                case.fail("wrong load", f"other output in silence: {done.said}")
