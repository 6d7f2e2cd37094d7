"""Run `gpt` in this process, as the shell would."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cli.main import main

SMALL = [
    *("--set", "model.width=16", "--set", "model.blocks=1", "--set", "model.heads=2", "--set", "model.context=32"),
    *("--set", "model.vocab_size=400", "--set", "loop.batch=4", "--set", "data.documents=40"),
    *("--set", "data.final_evaluation_tokens=500", "--set", "loop.samples=1"),
]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Gpt = Callable[..., Result]


@pytest.fixture
def gpt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpt:
    """gpt("info", "runs/a") in an empty working folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

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
