"""A folder has one writer at a time, nothing in it is deleted but what is known, and a failure leaves nothing."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.folders import LOCK, REPLACED, one_writer, require_free

ROOT = Path(__file__).parents[2]
FILES = re.compile(rf"{re.escape(LOCK)}|mark\.json|parts/\d+|own/(parts/)?({re.escape(LOCK)}|\d+)")


@contextmanager
def holder(folder: Path, then: str = "sys.stdin.read()") -> Iterator[subprocess.Popen[str]]:
    """Another process that writes the folder, until it is killed or told to end."""
    script = f"""
import os, re, sys, time
from pathlib import Path
from engine.folders import one_writer
with one_writer(Path({str(folder)!r}), re.compile("")):
    print("held", flush=True)
    {then}
"""
    command = [sys.executable, "-c", script, "train", "nano"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write(folder: Path, *, patience: float = 0.0) -> None:
    with one_writer(folder, FILES, patience=patience):
        (folder / "mark.json").write_text("new")


def test_a_second_writer_is_refused_by_host_and_process_and_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with holder(run) as process:
        (run / "mark.json").write_text("theirs")
        with pytest.raises(InputError) as refused:
            write(run)
        for part in (str(run), str(process.pid), socket.gethostname(), "gpt train nano"):
            assert part in str(refused.value)
        (tmp_path / "link").symlink_to(run)
        for same in (tmp_path / "link", tmp_path / "other" / ".." / "run"):
            (tmp_path / "other").mkdir(exist_ok=True)
            with pytest.raises(InputError, match=str(process.pid)):
                write(same)
        # Even where it was moved meanwhile.
        run.rename(tmp_path / "moved")
        with pytest.raises(InputError, match=str(process.pid)):
            write(tmp_path / "moved")
        assert (tmp_path / "moved/mark.json").read_text() == "theirs"
    write(tmp_path / "moved")
    assert [path.name for path in (tmp_path / "moved").iterdir()] == ["mark.json"]


def test_the_lock_ends_with_its_process_and_not_with_its_children(tmp_path: Path) -> None:
    with holder(tmp_path / "run", "print(os.fork() or time.sleep(60), flush=True); time.sleep(60)") as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        os.kill(child, 0)  # the orphan lives, with every descriptor
        write(tmp_path / "run")
        os.kill(child, signal.SIGKILL)


def test_who_is_started_again_waits_for_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path / "run", "time.sleep(0.7)"):
        begin = time.monotonic()
        write(tmp_path / "run", patience=30)
        assert time.monotonic() - begin < 20


def test_many_writers_never_hold_one_folder_at_once(tmp_path: Path) -> None:
    script = """
import os, re, sys
from pathlib import Path
from engine.errors import InputError
from engine.folders import one_writer
folder, held = Path(sys.argv[1]), 0
while held < 40:
    try:
        with one_writer(folder / "run", re.compile("")):
            os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))
            held += 1
            os.unlink(folder / "alone")
    except InputError:
        pass
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    many = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment) for _ in range(3)]
    assert [process.wait(60) for process in many] == [0, 0, 0]
    assert list(tmp_path.rglob(LOCK)) == []


def test_a_file_system_without_locks_is_told_of_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    said: list[str] = []
    with one_writer(tmp_path / "run", FILES, say=said.append):
        (tmp_path / "run/mark.json").write_text("new")
    assert len(said) == 1 and "cannot be locked (No locks available)" in said[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mark.json"]


def test_a_link_or_a_file_in_the_place_of_lock_or_folder_is_not_written_through(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        write(thesis)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(thesis)
    with pytest.raises(OSError, match=LOCK):
        write(tmp_path / "run")
    assert thesis.read_text() == "mine"


def test_a_failure_leaves_a_folder_as_it_was_and_no_new_one(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    (kept / "parts").mkdir(parents=True)
    (kept / "parts" / "1").write_text("one")
    for folder in (kept, tmp_path / "new" / "deep"):
        with pytest.raises(InputError, match="bad"), one_writer(folder, FILES):
            (folder / "parts").mkdir(exist_ok=True)
            (folder / "parts" / "2").write_text("two")
            raise InputError("bad")
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (kept / "parts").iterdir()] == ["1"]
    with pytest.raises(InputError), one_writer(tmp_path / "new", FILES, keep=lambda error: True):
        (tmp_path / "new" / "mark.json").write_text("{}")
        raise InputError("bad")
    assert (tmp_path / "new" / "mark.json").exists()


def test_what_a_person_has_put_there_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(InputError), one_writer(tmp_path / "run", FILES) as folder:
        (folder.folder / "mark.json").write_text("{}")
        (folder.folder / "thesis.txt").write_text("mine")
        raise InputError("bad")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def old(folder: Path) -> dict[str, str]:
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    (folder / "mark.json").write_text("old")
    (folder / "parts/1").write_text("one")
    return contents(folder)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_is_replaced_comes_back_after_a_failure_and_is_said(tmp_path: Path) -> None:
    before, said = old(tmp_path), list[str]()
    with pytest.raises(InputError, match="bad"), one_writer(tmp_path, FILES) as folder:
        folder.replace("the run", said.append)
        (tmp_path / "mark.json").write_text("new")
        raise InputError("bad")
    assert contents(tmp_path) == before and said == [f"deleting the run in {tmp_path}: 2 files, 0.0 MB"]


def test_what_a_killed_try_had_set_aside_is_still_what_comes_back(tmp_path: Path) -> None:
    before = old(tmp_path)
    (tmp_path / REPLACED).mkdir()
    for name in ("mark.json", "parts"):
        (tmp_path / name).rename(tmp_path / REPLACED / name)
    (tmp_path / "mark.json").write_text("half made")
    with pytest.raises(InputError, match="bad"), one_writer(tmp_path, FILES) as folder:
        folder.replace("the run", lambda message: None)
        raise InputError("bad")
    assert contents(tmp_path) == before


def test_what_was_set_aside_comes_back_after_a_kill_or_an_error_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = old(tmp_path)
    script = """
import os, re, sys
from pathlib import Path
from engine.folders import one_writer
with one_writer(Path(sys.argv[1]), re.compile(".*")) as folder:
    folder.replace("the run", print)
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, REPLACED}
    with one_writer(tmp_path, FILES):
        assert contents(tmp_path).items() >= before.items()
    honest = os.rename

    def busy(path: Path, to: Path) -> None:
        if path.name == "parts" and to.parent.name == REPLACED:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        honest(path, to)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(OSError, match="busy"), one_writer(tmp_path, FILES) as folder:
        folder.replace("the run", lambda message: None)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.txt", "parts/notes", "link", "parts/1x", ".hidden"])
def test_nothing_is_deleted_where_something_is_not_known(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    old(run)
    if name == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "1").write_text("mine")
        (run / name).symlink_to(tmp_path / "elsewhere")
    else:
        (run / name).write_text("mine")
    before = contents(run)
    refused = rf"{re.escape(str(run / name))} is no part of the run.*--out"
    with pytest.raises(InputError, match=refused), one_writer(run, FILES) as folder:
        folder.replace("the run", lambda message: None)
    assert contents(run) == before and not (run / REPLACED).exists()


def test_a_folder_is_not_replaced_while_one_in_it_is_written(tmp_path: Path) -> None:
    before = old(tmp_path)
    with holder(tmp_path / "own") as process:
        refused = str(process.pid)
        with pytest.raises(InputError, match=refused), one_writer(tmp_path, FILES) as folder:
            folder.replace("the demo", lambda message: None)
    assert contents(tmp_path).items() >= before.items() and not (tmp_path / REPLACED).exists()


def test_a_file_is_replaced_only_where_it_is_such_a_one(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        if path.read_text() != "ours":
            raise InputError("line 1 is no pair")

    path = tmp_path / "pairs"
    require_free(path, False, read)
    path.write_text("ours")
    with pytest.raises(InputError, match="--overwrite replaces it"):
        require_free(path, False, read)
    require_free(path, True, read)
    path.write_text("a thesis")
    with pytest.raises(InputError, match=r"left alone.*line 1 is no pair"):
        require_free(path, True, read)
    with pytest.raises(InputError, match="is a folder"):
        require_free(tmp_path, True, read)
    with pytest.raises(InputError, match="Not a directory"):
        require_free(path / "a" / "b", False, read)
