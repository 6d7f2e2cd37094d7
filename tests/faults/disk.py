"""A disk that fills: a small tmpfs of every size between nothing and enough. Needs root, for mount."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.faults import child, world
from tests.faults.board import Board, Case

WRITERS = {
    "train": (
        f"train nano --data ready --out full/new --steps 4 --set loop.save_every=1 {world.SMALL}",
        "train nano --out full/new --resume",
    ),
    "finetune": (
        f"finetune base --data chats.jsonl --out full/new --steps 2 {world.TUNE}",
        "finetune base --out full/new --resume",
    ),
    "prepare": ("data prepare words.txt --out full/new --vocab-size 320 --workers 1", ""),
    "tokenizer": ("tokenizer train --data words.txt --vocab-size 320 --out full/new.model", ""),
    "export": ("export base --out full/new", ""),
    "gguf": ("export base --gguf --out full/new.gguf", ""),
    "import": ("import hf --out full/new", ""),
    "evaluate": ("evaluate full/base --count 2 --tokens 200 --device cpu --precision fp32", ""),
    "pairs": (
        "rlhf pairs full/chat --prompts 40 --answers 3 --judge reward --data chats.jsonl --device cpu --precision fp32",
        "",
    ),
}
SIZES = 12
GROWN = "64m"
MINE = "the only copy"


def unavailable() -> str:
    """Why this part cannot be tried here; "" where it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        return "a small disk is made by mount, which needs root"
    return ""


def mount(folder: Path, size: str, how: str = "") -> bool:
    options = f"size={size}{how}"
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def used(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def run(board: Board) -> None:
    names, needs = list(WRITERS), dict[str, int]()
    for case in board.cases(len(names) * SIZES):
        name, part = names[case.number % len(names)], case.number // len(names)
        command, go_on = WRITERS[name]
        with child.copied(board.world, case.folder / "w") as here:
            full = here / "full"
            full.mkdir()
            if name not in needs:
                _furnish(here, command)
                done = child.run(child.gpt(*command.split()), here)
                assert done.code == 0, done.said
                needs[name] = used(full)
                shutil.rmtree(full)
                full.mkdir()
            # A little more than what is there already, up to a little more than what is needed.
            held = sum(used(here / each) for each in ("base", "chat") if f"full/{each}" in command)
            size = 16384 + held + int((needs[name] - held + 65536) * part / (SIZES - 1))
            case.what = f"a disk of {size // 1024} KiB: gpt {command}"
            if not mount(full, f"{size // 1024}k"):
                board.note("a tmpfs could not be mounted")
                return
            try:
                filled(case, here, full, command, go_on)
            finally:
                subprocess.run(["umount", "-l", str(full)], capture_output=True)


def _furnish(here: Path, command: str) -> None:
    (here / "full" / "mine.txt").write_text(MINE)
    for each in ("base", "chat"):
        if f"full/{each}" in command:
            shutil.copytree(here / each, here / "full" / each)


def filled(case: Case, here: Path, full: Path, command: str, go_on: str) -> None:
    _furnish(here, command)
    done = child.run(child.gpt(*command.split()), here)
    case.judge(done, ("full", "disk"))
    if (full / "mine.txt").read_text() != MINE:
        case.fail("lost", done.said)
    if done.code == 2 and "full/" not in done.said.replace("\n", ""):
        case.fail("unnamed", f"no file is named: {done.said}")
    if done.code == 0:
        case.board.note("a disk that was large enough")
        return
    # The disk has grown: what was said to do has to work.
    if subprocess.run(["mount", "-o", f"remount,size={GROWN}", str(full)], capture_output=True).returncode:
        return
    again = go_on if go_on and (full / "new" / "config.json").exists() else command
    done = child.run(child.gpt(*again.split()), here)
    case.judge(done, ("full",))
    if done.code:
        case.fail("left behind", f"with room it goes on no more: gpt {again}: {done.said}")
