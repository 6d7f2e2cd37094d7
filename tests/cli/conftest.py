"""Run `gpt` in this process, as the shell would."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cli.main import main
from tests.train.data.conftest import hub

__all__ = ["hub"]  # a fixture here too

SMALL = [
    *("--set", "model.width=16", "--set", "model.blocks=1", "--set", "model.heads=2", "--set", "model.context=32"),
    *("--set", "model.vocab_size=400", "--set", "loop.batch=4", "--set", "data.documents=40"),
    *("--set", "data.final_evaluation_tokens=500", "--set", "loop.samples=1"),
]

# A reward model of two steps.
LEARN = (
    *("--steps", "2", "--set", "loop.samples=1"),
    *("--set", "data.documents=40", "--set", "data.final_evaluation_tokens=2000"),
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


Gpt = Callable[..., Result]


@pytest.fixture
def gpt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpt:
    """gpt("info", "runs/a") in an empty working folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    # What a command leaves in the environment for its children is taken back.
    for name in ("PYTHONSAFEPATH", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["gpt", *arguments])
        capsys.readouterr()
        try:
            main()
            code: int | str | None = 0
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return Result(int(code or 0), out, err)

    return run


@pytest.fixture
def trained(gpt: Gpt) -> Path:
    """A run of two steps."""
    assert gpt("train", "nano", "--steps", "2", "--out", "runs/small", *SMALL).code == 0
    return Path("runs/small")


@pytest.fixture
def chat(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> str:
    """A chat model of a step, which has not learnt a thing, and pairs.jsonl beside it."""
    monkeypatch.setattr("rlhf.reward_model.ANSWERS", 4)
    small = [*SMALL, "--set", "model.context=64"]
    assert gpt("train", "nano", "--steps", "1", "--out", "runs/small", *small).code == 0
    rows = [{"prompt": f"say {n}", "response": f"{n}!"} for n in range(200)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = gpt("finetune", "runs/small", "--data", "chats.jsonl", "--steps", "1", "--batch", "2")
    assert tuned.code == 0, tuned.err
    pairs = [{"prompt": f"say {n}", "chosen": f"{n}!", "rejected": f"{n}?"} for n in range(80)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return "runs/small-chat"
