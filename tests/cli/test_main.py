"""The door itself: help in groups, versions, every setting listed, and no import from where a person stands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import COMMANDS
from engine.config import Recipe, override_text, preset
from engine.config import settings as all_settings
from engine.tokenizer import Tokenizer
from tests.cli.conftest import SMALL, Gpt

ROOT = Path(__file__).parents[2]


def test_help_lists_every_command_in_its_group_with_a_phrase_of_one_line(
    gpt: Gpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = gpt("--help").out.splitlines()
    panels = [line.strip("╭─╮ ") for line in lines if line.startswith("╭")]
    assert panels == ["Options", "Train", "Use", "Share", "Look", "Measure"]
    for name, (_, phrase) in (each for panel in COMMANDS.values() for each in panel.items()):
        assert any(line.strip("│ ").split(maxsplit=1) == [name, phrase] for line in lines), name


def test_versions_are_told_where_it_is_installed_and_where_it_is_not(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    told = gpt("--version")
    assert told.code == 0 and told.out.startswith("gpt-from-text ") and "torch 2." in told.out and "triton" in told.out
    monkeypatch.setattr("cli.main.DISTRIBUTION", "no-such-distribution")
    assert gpt("--version").out.startswith("no-such-distribution not installed, torch ")


def test_a_bug_is_a_short_report_and_its_traceback_is_kept(
    gpt: Gpt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("the left wheel\nfell off")

    monkeypatch.setattr("engine.run.Run.read_recipe", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    report = gpt("serve", "a run", "--api-key", "secret")
    assert report.code == 1 and "Traceback" not in report.err and len(report.err.splitlines()) == 4
    assert "a bug of gpt, not of yours: ValueError: the left wheel\nfell off\n" in report.err
    assert "gpt serve 'a run' --api-key ..." in report.err and "torch 2." in report.err
    (kept,) = tmp_path.glob("gpt-bug-*.txt")
    assert str(kept) in report.err and "in broken" in kept.read_text() and "secret" not in kept.read_text()

    def odd(*_: object) -> None:
        raise OSError("a library's own")

    with monkeypatch.context() as patch:
        patch.setattr("engine.run.Run.read_recipe", odd)
        report = gpt("info", "a")
    assert report.code == 1 and "a bug of gpt, not of yours: OSError: a library's own" in report.err

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert "could not be written to a file (No such file or directory)" in gpt("info", "a").err
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for variables in ({"GPT_TRACEBACK": "1"}, alone):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="wheel"):
            for name, value in variables.items():
                patch.setenv(name, value)
            gpt("info", "a")


def test_every_setting_is_listed_with_a_sentence_and_set_takes_it(gpt: Gpt) -> None:
    lines = gpt("settings", "tiny").out.splitlines()
    assert "model.blocks=12" in "\n".join(lines) and len(lines) == len(list(all_settings(Recipe))) > 80
    for line in lines:
        setting, _, sentence = line.partition(" ")
        assert sentence.strip().endswith(".")
        if not setting.startswith("budget."):
            override_text(preset("tiny"), setting)
    assert "model.width=(by preset)" in gpt("settings").out and "loop.batch=16" in gpt("settings").out


@pytest.mark.parametrize(
    "command",
    [
        ("train", "nano", "--data", "words.txt", "--gpus", "2", "--device", "cpu", "--steps", "1", *SMALL),
        ("data", "prepare", "words.txt", "--out", "ready", "--vocab-size", "300", "--workers", "2"),
    ],
    ids=lambda command: command[0],
)
def test_child_processes_import_nothing_from_the_working_folder(tmp_path: Path, command: tuple[str, ...]) -> None:
    for name in ("train", "cli", "engine", "torch"):
        (tmp_path / f"{name}.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    (tmp_path / "words.txt").write_text("<|endoftext|>\n".join(f"Little story number {n}.\n" for n in range(3000)))
    # As pip writes it: Python puts the script's folder first, and not the working directory.
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "gpt"
    script.write_text("from cli.main import main\n\nif __name__ == '__main__':\n    main()\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    words = [sys.executable, str(script), *command]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()


def test_from_the_tree_alone_children_find_the_project(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("<|endoftext|>\n".join(f"Little story number {n}.\n" for n in range(3000)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    paths = [str(tmp_path / "words.txt"), "--out", str(tmp_path / "ready")]
    words = [sys.executable, "-m", "cli", "data", "prepare", *paths, "--vocab-size", "300", "--workers", "2"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = "import cli.main as m, os, subprocess, sys; m.protect_children(); "
    script += "sys.exit(subprocess.run([sys.executable, '-m', 'cli', '--version'], cwd='/').returncode)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def shell(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line with `gpt` in it, in a folder, with more in the environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    line = command.replace("gpt", f"{sys.executable} -m cli")
    return subprocess.run(["sh", "-c", line], cwd=folder, env=environment, capture_output=True)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "1"}, "RANK is 1, WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, WORLD_SIZE is 2"),
        ({"LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE is many"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "RANK is 2, WORLD_SIZE is 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
    ],
    ids=str,
)
def test_an_environment_of_half_a_group_of_processes_is_refused_aloud(
    gpt: Gpt, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = gpt("settings", "nano")
    assert done.code == 2 and done.out == "" and expected in done.err


def test_text_reaches_an_ascii_terminal_and_closed_streams_harm_no_file(tmp_path: Path) -> None:
    plain = shell("gpt settings 'na\u00efve\udcff'", tmp_path, PYTHONIOENCODING="ascii")
    assert plain.returncode == 2 and plain.stderr.startswith(b"error: no preset is called 'na\\xefve\\udcff'")
    # Without a standard output, error or input the next files to be opened would get their numbers.
    (tmp_path / "words.txt").write_text("the cat sat on the mat. " * 50)
    closed = shell("gpt tokenizer train --data words.txt --vocab-size 280 >&- 2>&- <&-", tmp_path)
    assert closed.returncode == 0 and closed.stderr == b""
    assert Tokenizer.load(tmp_path / "tokenizer.model").vocab_size == 280


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = shell("mkdir gone && cd gone && rmdir ../gone && gpt data show words.txt", tmp_path)
    assert gone.returncode == 2 and b"working directory" in gone.stderr and b"Traceback" not in gone.stderr


def test_another_locale_changes_no_text(tmp_path: Path) -> None:
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell("gpt settings 'na\u00efve'", tmp_path, **variables)
    assert done.returncode == 2 and "'na\u00efve'".encode() in done.stderr
