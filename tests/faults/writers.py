"""Two writers in one folder: one of them goes on as if it were alone, and the other is told so."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import child, world
from tests.faults.board import Board, Case

STEPS = 400
TRAIN = f"train nano --data ready --out new --steps {STEPS} --set loop.save_every=5 {world.SMALL}"
RESUME = f"train nano --out new --resume --steps {STEPS}"
# What the first writer does, and what a second one tries beside it.
PAIRS = [
    (TRAIN, TRAIN),
    (TRAIN, RESUME),
    (TRAIN, f"{TRAIN} --overwrite"),
    (TRAIN, f"finetune base --data chats.jsonl --out new --overwrite --steps 1 {world.TUNE}"),
    (TRAIN, "data prepare words.txt --out new --vocab-size 320 --workers 1"),
    (TRAIN, "export base --out new"),
    (TRAIN, "demo --short --out new --overwrite"),
    (RESUME, RESUME),
    (RESUME, f"{TRAIN} --overwrite"),
    (
        "data prepare words.txt --out new --vocab-size 320 --workers 1",
        "data prepare words.txt --out new --vocab-size 320 --workers 1",
    ),
]
READERS = ["info new", "generate new hello --device cpu --max-tokens 2"]
TIMES = 4


def run(board: Board) -> None:
    plans = [*(PAIRS * TIMES), *((TRAIN, reader) for reader in READERS)]
    for case in board.cases(len(plans)):
        first, second = plans[case.number]
        case.what = f"gpt {first}, and beside it gpt {second}"
        with child.copied(board.world, case.folder / "w") as here:
            together(case, here, first, second)


def together(case: Case, here: Path, first: str, second: str) -> None:
    if first == RESUME:
        done = child.run(child.gpt(*TRAIN.replace(f"--steps {STEPS}", "--steps 5").split()), here)
        case.judge(done)
    # Children put their output beside their folder: each needs one.
    one = child.Child(child.gpt(*first.split()), here)
    if case.random.random() < 0.75:
        one.until("step 6 " if first == RESUME else "step 1 ", 20)
    time.sleep(case.random.random() * 0.5)
    other_folder = here.parent / "other"
    other_folder.mkdir()
    other = child.run(in_folder(here, second), other_folder, 40)
    case.judge(other, ("new",))
    done = one.wait(60)
    case.judge(done, ("new",))
    if second in READERS:
        return
    codes = sorted((done.code, other.code))
    if first.startswith("data"):
        if 0 not in codes:
            case.fail("lost", f"neither came to its end: {codes} {done.said} {other.said}")
        return
    winner = done if done.code == 0 else other
    if 0 not in codes:
        case.fail("lost", f"neither came to its end: {codes} {done.said} {other.said}")
    elif done.code == other.code == 0 and "come to its end" not in other.said + done.said:
        case.fail("lost", f"both say that they wrote it all: {other.said}")
    metrics = here / "new" / "metrics.jsonl"
    if winner is done and metrics.exists():
        steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "loss" in row]
        if steps != list(range(1, STEPS + 1)):
            case.fail("lost", f"metrics of {len(steps)} steps, {len(set(steps))} of them different, not {STEPS}")


def in_folder(folder: Path, words: str) -> Callable[[], None]:
    def work() -> None:
        os.chdir(folder)
        child.gpt(*words.split())()

    return work
