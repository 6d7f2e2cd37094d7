"""metrics.jsonl and wandb."""

from pathlib import Path
from typing import Any

import pytest

from train.tracking import MetricsFile, Trackers, Wandb, read_metrics


def test_lines_are_on_disk_as_they_are_logged(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.log({"step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    file.close()


def test_resuming_drops_the_steps_that_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    MetricsFile(path, 2).close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    MetricsFile(path, 0).close()
    assert read_metrics(path) == []


def test_several_trackers_are_one() -> None:
    heard: list[Any] = []

    class Ear:
        def log(self, metrics: Any) -> None:
            heard.append(metrics)

        def say(self, message: str) -> None:
            heard.append(message)

        def close(self) -> None:
            heard.append("closed")

    both = Trackers([Ear(), Ear()])
    both.log({"step": 1})
    both.say("hello")
    both.close()
    assert heard == [{"step": 1}, {"step": 1}, "hello", "hello", "closed", "closed"]


def test_wandb_records_offline_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    said: list[str] = []
    tracker = Wandb(tmp_path, "run", {"model": {"width": 16}}, said.append)
    tracker.log({"step": 1, "loss": 2.0})
    tracker.close()
    assert any("offline" in line for line in said)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    identity = (tmp_path / "wandb-id").read_text()
    Wandb(tmp_path, "run", {}, said.append).close()
    assert (tmp_path / "wandb-id").read_text() == identity
