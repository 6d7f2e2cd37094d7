"""Training on a stream: nothing is prepared but what is held out, and a stopped run goes on to the same losses."""

import dataclasses
import json
from pathlib import Path

import pytest

from engine.config import BudgetConfig, Recipe, override
from engine.errors import InputError
from tests.train.conftest import Train, stop_after
from tests.train.test_loop import losses


@pytest.fixture
def streamed(small: Recipe, prepared: Path, tmp_path: Path) -> Recipe:
    rows = [json.dumps({"text": f"The fox number {n} " + "ran home and " * (n % 40)}) for n in range(300)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    settings = {"data.source": str(tmp_path / "texts.jsonl"), "data.stream": True, "data.tokenizer": str(prepared)}
    for path, value in settings.items():
        small = override(small, path, value)
    return small


def test_a_stopped_run_goes_on_as_if_undisturbed(
    streamed: Recipe, train: Train, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recorder = train(streamed, "whole")
    assert "start      without bigrams: a stream is not read beforehand" in recorder.said
    assert any("streamed, " in line and "tokens to validate" in line for line in recorder.said)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train(streamed, "stopped")
    train(streamed, "stopped", resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert [folder.name for folder in (tmp_path / "whole/data").iterdir() if folder.is_dir()] == ["validation"]
    assert (tmp_path / "whole/tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()


def test_what_a_stream_cannot_do_is_refused(streamed: Recipe, train: Train, prepared: Path) -> None:
    with pytest.raises(InputError, match="nobody knows the length of a stream: give --tokens"):
        dataclasses.replace(streamed, budget=BudgetConfig(epochs=1))
    with pytest.raises(InputError, match="is prepared already: train on it without --stream"):
        train(override(streamed, "data.source", str(prepared)), "other")
