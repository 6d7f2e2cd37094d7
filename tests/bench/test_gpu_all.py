"""bench/gpu_all.py: a day on a GPU goes on where it was cut, and nothing that is done is done again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_all
from bench.gpu_all import Step
from tests.kernels.conftest import pytest_runtest_logfinish

# It stands for Python: a step "sh LINES" runs the lines, and the device is there while the file "device" is.
PYTHON = """#!/bin/sh
[ "$1" = -c ] && { cat "$(dirname "$0")/device"; exit; }
shift 2
eval "$*"
"""
THREE = (Step("one", 60, "sh 'echo first; exit 3'"), Step("two", 60, "sh 'echo {out}'"), Step("three", 60, "sh true"))

Call = Callable[..., int]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "device").write_text("a device\n")
    monkeypatch.setattr(gpu_all, "PYTHON", str(tmp_path / "python"))
    monkeypatch.setattr(gpu_all, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_all, "code", lambda: "this code")
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def sigint() -> Iterator[Callable[[Any], Any]]:
    """Return what sets how this process takes an interrupt, until the test ends."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def call(world: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    def call(*steps: Step, folder: str = "out", options: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(gpu_all, "STEPS", steps or THREE)
        return gpu_all.main([str(world / folder), *options])

    return call


def ran(world: Path, folder: str = "out") -> list[str]:
    return sorted(path.name for path in (world / folder).iterdir() if path.is_dir())


def test_a_step_that_fails_is_told_and_the_next_one_runs(
    world: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call() == 1
    assert ran(world) == ["one-1", "three-1", "two-1"]
    assert (world / "out/one-1/log.txt").read_text() == "first\n"
    assert (world / "out/two-1/log.txt").read_text() == f"{world}/out/two-1\n"
    told = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert told == [["one", "exit", "3"], ["two", "exit", "0"], ["three", "exit", "0"]]


def test_what_is_done_is_not_done_again_wherever_it_is_written_down(world: Path, call: Call) -> None:
    assert call(*THREE[1:]) == 0
    assert call(*THREE[1:]) == 0 and ran(world) == ["three-1", "two-1"]
    (world / "out").rename(world / "results")
    assert call(*THREE[1:]) == 0 and ran(world) == []
    assert call(*THREE[1:], options=("two",)) == 0 and ran(world) == ["two-2"]


def test_another_device_begins_anew(world: Path, call: Call) -> None:
    call()
    (world / "device").write_text("another device\n")
    (world / "out/one-1").rename(world / "out/old")
    call()
    assert "one-1" in ran(world)


def test_with_other_code_what_never_ran_comes_first_then_what_failed(
    world: Path, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, three = THREE
    call(two, one)
    monkeypatch.setattr(gpu_all, "code", lambda: "mended")
    capsys.readouterr()
    call(two, one, three)
    said = [line.split()[1].rstrip(",") for line in capsys.readouterr().out.splitlines() if line.startswith("==")]
    assert said == ["three-1", "one-2", "two-2"]


@pytest.mark.parametrize("started", [signal.default_int_handler, signal.SIG_IGN], ids=["by hand", "with &"])
def test_a_step_out_of_its_time_comes_last_and_has_longer(
    world: Path, call: Call, capsys: pytest.CaptureFixture[str], sigint: Callable[[Any], Any], started: Any
) -> None:
    sigint(started)
    slow = Step("slow", 1, "sh 'trap \"echo interrupted; exit\" INT; sleep 8 & wait'")
    assert call(slow, THREE[1]) == 1
    cut, ended = (mark for mark in gpu_all.marks([world / "out"], {}) if "seconds" in mark)
    assert cut["out_of_time"] == 1 and "exit" not in cut and ended["exit"] == 0
    assert (world / "out/slow-1/log.txt").read_text() == "interrupted\n"
    (world / "results").symlink_to("out")  # it is written down twice, and counts once
    assert call(Step("slow", 1, "sh true"), THREE[2]) == 0
    said = capsys.readouterr().out
    assert 0 < said.index("== three-1, at most 60 s") < said.index("== slow-2, at most 2 s")


def test_the_call_ends_in_time_and_what_it_cuts_is_next(
    world: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_all, "LEAST", 0.3)
    monkeypatch.setattr(gpu_all, "GRACE", 0.3)
    steps = (Step("long", 60, "sh 'sleep 60'"), THREE[1])
    began = time.monotonic()
    assert call(*steps, options=("--seconds", "1")) == 1
    assert time.monotonic() - began < 5 and ran(world) == ["long-1"]
    past = gpu_all.marks([world / "out"], {})
    assert [step.name for step in gpu_all.remaining(past, [], "this code")] == ["long", "two"]


def test_a_device_that_is_gone_ends_the_call_and_nothing_counts_as_done(
    world: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(Step("breaks", 60, f"sh 'rm {world}/device; exit 1'"), THREE[1]) == 1
    assert "the device is gone: breaks will be run again" in capsys.readouterr().err
    assert ran(world) == ["breaks-1"]
    assert call(THREE[1]) == 2 and "no CUDA device" in capsys.readouterr().err
    (world / "device").write_text("a device\n")
    assert call(Step("breaks", 60, "sh true"), THREE[1]) == 0
    assert ran(world) == ["breaks-1", "breaks-2", "two-1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_where_it_is_killed_nothing_goes_on_and_the_next_call_begins_there(
    number: signal.Signals, world: Path, call: Call
) -> None:
    two = f"sh 'echo $$ > {world}/child; exec sleep 60'"
    script = f"""from bench import gpu_all
gpu_all.PYTHON, gpu_all.code = {gpu_all.PYTHON!r}, lambda: "this code"
gpu_all.STEPS = gpu_all.Step("one", 60, "sh true"), gpu_all.Step("two", 60, {two!r})
gpu_all.main([{str(world / "out")!r}])"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=gpu_all.ROOT)
    until(lambda: (world / "child").exists() and (world / "child").read_text().endswith("\n"))
    process.send_signal(number)
    assert process.wait(10) == (128 + number if number == signal.SIGTERM else -number)
    child = int((world / "child").read_text())
    until(lambda: not alive(child))
    (world / "out" / gpu_all.MARKS).open("a").write('{"step": "thr')
    assert call(Step("one", 60, "sh true"), Step("two", 60, "sh true")) == 0
    assert ran(world) == ["one-1", "two-1", "two-2"]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("xdist", [True, False])
def test_tests_that_ended_count_though_pytest_hangs(xdist: bool, world: Path, call: Call) -> None:
    lines = ("[gw1] [ 50%] PASSED tests/a.py::b[1 2]", "[gw0] [100%] FAILED tests/a.py::c")
    if not xdist:
        lines = ("tests/a.py::b[1 2] PASSED       [ 50%]", "tests/a.py::c FAILED       [100%]")
    (world / "lines").write_text("\n".join(lines))
    assert call(Step("tests", 1, f"sh 'cat {world}/lines; exec sleep 60'")) == 1
    (mark,) = (mark for mark in gpu_all.marks([world / "out"], {}) if "seconds" in mark)
    assert mark["tests"] == {"PASSED": 1, "FAILED": 1} and mark["exit"] != 0


@pytest.mark.parametrize("failed", [True, False])
def test_a_device_that_failed_ends_the_process_of_its_test(failed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        if failed:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ended: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    pytest_runtest_logfinish()
    assert ended == [1] * failed


def test_code_is_what_python_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_all, "ROOT", tmp_path)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "a.py").write_text("1")
    before = gpu_all.code()
    (tmp_path / "bench" / "results" / "b.json").write_text("{}")
    assert gpu_all.code() == before
    (tmp_path / "bench" / "a.py").write_text("2")
    assert gpu_all.code() != before


def test_an_unknown_step_is_named(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(options=("four",))
    assert "no step is called four" in capsys.readouterr().err
