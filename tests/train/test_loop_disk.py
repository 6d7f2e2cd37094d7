"""A run on a disk that fills: it makes room as its own rule allows, and else ends saved, with one sentence."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import checkpoint, disk
from engine.checkpoint import checkpoints
from engine.config import Recipe, override
from engine.errors import DiskError
from tests.train.conftest import Train
from train.tracking import Metrics, MetricsFile, read_metrics

Refuse = Callable[..., list[str]]


@pytest.fixture
def saving(small: Recipe) -> Recipe:
    """Six steps, each saved, of which two are kept."""
    return override(small, "loop.save_every", 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds: measuring the machine, drawing, and a disk under load."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("train.trainer.measured_peak", lambda runtime: 1e12)
    monkeypatch.setattr("train.trainer.write_report", lambda *arguments: None)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Have the disk be full from the `first` time on that something of this name is written, and `times` times."""

    sync, append, log, rest = disk.sync, disk.append, MetricsFile.log, checkpoint._save_rest

    def patch(name: str, first: int, times: int = 1000) -> list[str]:
        tried: list[str] = []

        def check(path: Path) -> None:
            if name in str(path):
                tried.append(path.name)
                if first <= len(tried) < first + times:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def noted_sync(path: Path) -> None:
            if path.is_file() and path.name.startswith(".writing-"):
                check(path)
            sync(path)

        def noted_append(path: Path, text: str) -> None:
            with disk.writing(path):
                check(path)
            append(path, text)

        def noted_log(self: MetricsFile, metrics: Metrics) -> None:
            with disk.writing(self.path):
                check(self.path)
            log(self, metrics)

        def noted_rest(path: Path, step: int, *content: Any) -> None:
            check(path)
            rest(path, step, *content)

        monkeypatch.setattr(disk, "sync", noted_sync)
        monkeypatch.setattr(disk, "append", noted_append)
        monkeypatch.setattr(MetricsFile, "log", noted_log)
        monkeypatch.setattr(checkpoint, "_save_rest", noted_rest)
        return tried

    return patch


def steps(run: Path) -> list[int]:
    return [each.step for each in checkpoints(run / "checkpoints")]


def test_a_checkpoint_that_does_not_fit_makes_room_and_the_next_one_takes_its_place(
    saving: Recipe, train: Train, tmp_path: Path, refuse: Refuse
) -> None:
    saving = override(saving, "loop.keep", 3)
    refuse("step-00000004", 1)
    outcome, recorder = train(saving)
    assert outcome.step == 6 and outcome.checkpoint.step == 6 and steps(tmp_path / "run")[-2:] == [5, 6]
    (said,) = [line for line in recorder.said if "cannot write" in line]
    assert "step-00000004: No space left on device; " in said and "step 5 is saved instead" in said
    assert not list((tmp_path / "run").rglob(".writing-*"))


def test_two_checkpoints_refused_end_the_run_with_the_one_before_them_and_it_goes_on(
    saving: Recipe, train: Train, tmp_path: Path, refuse: Refuse
) -> None:
    train(saving, "undisturbed")
    refuse("checkpoints/.writing-step", 5)
    with pytest.raises(DiskError, match=r"checkpoints/step-0+6: No space left on device; .* are wanted and"):
        train(saving)
    run = tmp_path / "run"
    assert steps(run) == [4] and len([*(run / "checkpoints").iterdir()]) == 1
    refuse("nothing", 1)
    outcome, _ = train(saving, resume=True)
    assert outcome.step == 6
    found, whole = (
        [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
        for folder in (run, tmp_path / "undisturbed")
    )
    assert found == whole


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.md", "evaluation.json"])
def test_what_else_cannot_be_written_stops_the_run_saved(
    name: str, saving: Recipe, train: Train, tmp_path: Path, refuse: Refuse
) -> None:
    saving = override(saving, "loop.evaluate_every", 2)
    refuse(name, 2 if name == "metrics.jsonl" else 1)
    with pytest.raises(DiskError, match=rf"{name}: No space left on device.*; step [12] is saved"):
        train(saving)
    last = steps(tmp_path / "run")[-1]
    assert last == (1 if name == "metrics.jsonl" else 2)


@pytest.mark.parametrize("times", [1, 2])
def test_a_line_of_metrics_that_was_refused_is_written_when_there_is_room(
    times: int, saving: Recipe, train: Train, tmp_path: Path, refuse: Refuse
) -> None:
    refuse("metrics.jsonl", 4, times)
    if times == 1:
        _, recorder = train(saving)
        assert any("Older checkpoints that may go are removed" in line for line in recorder.said)
    else:  # old checkpoints did not make enough; the line comes after the last one
        with pytest.raises(DiskError, match="step 3 is saved"):
            train(saving)
    logged = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert logged == ([1, 2, 3, 4, 5, 6] if times == 1 else [1, 2, 3])
