"""--overwrite of folders that hold what `gpt` did not make: nothing of a person's may go."""

import contextlib
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults import child
from tests.faults.board import Board, contents
from tests.faults.options import LINES, commands

MINE = "the only copy"


def thesis(folder: Path) -> None:
    folder.mkdir()
    (folder / "report.md").write_text(MINE)
    (folder / "thesis.tex").write_text(MINE)


def other_config(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "pytorch_model.safetensors").write_text(MINE)


def repository(folder: Path) -> None:
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / "report.md").write_text(MINE)


def run_and_notes(folder: Path) -> None:
    shutil.copytree("base", folder)
    (folder / "notes.txt").write_text(MINE)
    (folder / "checkpoints" / "mine.txt").write_text(MINE)


def run_in_report(folder: Path) -> None:
    """A trained run, which a person has put into a folder with a report."""
    folder.mkdir()
    shutil.copytree("base", folder / "base")
    (folder / "report.md").write_text(MINE)


def damaged_run(folder: Path) -> None:
    shutil.copytree("base", folder)
    (folder / "config.json").write_text("{")


def link_elsewhere(folder: Path) -> None:
    thesis(Path("elsewhere"))
    folder.symlink_to("elsewhere")


def linked_inside(folder: Path) -> None:
    """A run whose data lies in another place."""
    thesis(Path("elsewhere"))
    shutil.copytree("base", folder)
    (folder / "data").symlink_to(Path("elsewhere").resolve())


def parent_of_all(folder: Path) -> None:
    folder.mkdir()
    (folder / "report.md").write_text("This demo has not come to its end.\n")
    for name in ("base", "words.txt"):
        (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, folder / name)


def one_file(folder: Path) -> None:
    folder.write_text(MINE)


FOLDERS: list[Callable[[Path], None]] = [
    *(thesis, other_config, repository, run_and_notes, run_in_report),
    *(damaged_run, link_elsewhere, linked_inside, parent_of_all, one_file),
]


def run(board: Board) -> None:
    names = [path for path, command in commands() if "overwrite" in inspect.signature(command).parameters]
    plans = [(path, make, given) for path in names for make in FOLDERS for given in ("--overwrite", "")]
    for case in board.cases(len(plans)):
        path, make, given = plans[case.number]
        words = [*LINES[" ".join(path)].split(), "--out", "target", *given.split()]
        case.what = f"gpt {' '.join(words)} where target is {make.__name__}"
        with child.copied(board.world, case.folder / "w") as here:
            with contextlib.chdir(here):
                make(Path("target"))
            before = contents(here)
            done = child.run(child.gpt(*words), here, 20)
            after = contents(here)
            case.judge(done)
            ours = set() if make in (run_in_report, parent_of_all, thesis, repository) else _ours(before)
            lost = [name for name in before if before[name] != after.get(name) and name not in ours]
            if given == "" or done.code == 2:
                lost = [name for name in before if before[name] != after.get(name)]
            if lost:
                case.fail("lost", f"{', '.join(lost[:5])} changed or gone: {done.said}")


def _ours(before: dict[str, str]) -> set[str]:
    """What is in a copied run may go where that was asked for: all of it but what was put there."""
    mine = ("notes.txt", "mine.txt")
    return {name for name in before if name.startswith("target") and not name.endswith(mine) and name != "target/data"}
