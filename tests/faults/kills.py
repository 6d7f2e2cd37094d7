"""kill -9 at a random moment, while training, saving, preparing or exporting: it goes on, and nothing is lost."""

import json
import time
from pathlib import Path

from tests.faults import child, world
from tests.faults.board import Board, Case

KILLS = 200
# With every step saved, most moments are in the middle of a save.
TRAIN = f"train nano --data ready --out new --steps 8 --set loop.save_every=1 {world.SMALL}"
WORK = {
    "training": (TRAIN, "train nano --out new --resume"),
    "finetuning": (
        f"finetune base --data chats.jsonl --out new --steps 6 --set loop.save_every=1 {world.TUNE}",
        "finetune base --out new --resume",
    ),
    "preparing": ("data prepare words.txt --out new --vocab-size 320 --workers 1", ""),
    "tokenizing": ("tokenizer train --data words.txt --vocab-size 320 --out new/tokenizer.model", ""),
    "exporting": ("export base --out new", ""),
    "importing": ("import hf --out new", ""),
}
# What a clock says differs from one time to the next.
TIMES = ("seconds", "seconds_left", "tokens_per_second", "mfu", "process_tokens_per_second", "straggling", "memory")


def outcome(folder: Path) -> dict[str, object]:
    """What has to be the same, whether or not it was interrupted: every number and every weight, times apart."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            # A run that goes on evaluates once more, and so its evaluations are not compared.
            steps = [row for row in rows if "loss" in row]
            found[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in steps]
        elif file.suffix in (".tokens", ".starts", ".model") or file.name in ("model.safetensors", "tokenizer.json"):
            found[name] = file.read_bytes()
    # Which checkpoints are kept depends on when it was interrupted: the last one alone is compared.
    last = max((name for name in found if name.startswith("checkpoints/")), default=None)
    return {name: value for name, value in found.items() if not name.startswith("checkpoints/") or name == last}


def whole(folder: Path) -> int:
    """The step of the newest checkpoint that has its final name."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def run(board: Board) -> None:
    right: dict[str, tuple[dict[str, object], float]] = {}
    kinds = ["training"] * 4 + ["finetuning"] * 2 + ["preparing", "preparing", "tokenizing", "exporting", "importing"]
    for case in board.cases(KILLS):
        kind = kinds[case.number % len(kinds)]
        command, go_on = WORK[kind]
        if kind not in right:
            with child.copied(board.world, board.scratch / f"{board.part}-right-{board.worker}") as here:
                done = child.run(child.gpt(*command.split()), here)
                assert done.code == 0, done.said
                right[kind] = outcome(here / "new"), done.seconds
        moment = case.random.random() * right[kind][1]
        case.what = f"{kind}, killed after {moment:.3f} s: gpt {command}"
        with child.copied(board.world, case.folder / "w") as here:
            killed(case, here, command, go_on, moment, right[kind][0])


def killed(case: Case, here: Path, command: str, go_on: str, moment: float, right: dict[str, object]) -> None:
    started = child.Child(child.gpt(*command.split()), here)
    time.sleep(moment)
    started.kill()
    new, kept = here / "new", whole(here / "new")
    if kept:
        case.board.note("killed with a checkpoint there")
    resumed = bool(go_on) and (new / "config.json").exists()
    done = child.run(child.gpt(*(go_on if resumed else command).split()), here)
    if resumed and done.code == 2 and not kept and "--resume" not in done.said:
        # Nothing was saved yet: to begin anew is as good.
        done = child.run(child.gpt(*command.split(), "--overwrite"), here)
    case.judge(done, ("new",))
    if done.code == 2 and "is there already" in done.said and outcome(new) == right:
        case.board.note("killed when all was written")
    elif done.code == 2:
        case.fail("left behind", f"the same command is refused: {done.said}")
    elif done.code == 0:
        if resumed and kept and f"step {kept:,}" not in done.said and f"{kept:,} steps" not in done.said:
            case.board.note("resumed without naming the step")
        after = outcome(new)
        different = [name for name in {**right, **after} if right.get(name) != after.get(name)]
        if different:
            case.fail("lost", f"not as if it had not been killed: {', '.join(sorted(different)[:4])}")
        if left := [path.name for path in new.rglob(".writing*")]:
            case.fail("left behind", f"{', '.join(left[:4])} after the run went on")
