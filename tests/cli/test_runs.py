"""gpt runs, and what other commands say of a run that is not there."""

import json
import os
from pathlib import Path

from tests.cli.conftest import Gpt
from tests.engine.test_runs import RECIPE, make


def test_runs_are_a_table_and_json_and_a_damaged_one_is_named(gpt: Gpt) -> None:
    assert gpt("runs").code == 2
    Path("runs").mkdir()
    assert gpt("runs", "--json").out == "[]\n" and "runs holds no run" in gpt("runs").err
    make(Path("runs/nano"))
    make(Path("runs/broken"), loss=None).config.write_text("x")
    os.utime("runs/nano/checkpoints/step-00000010", (0, 0))
    shown = gpt("runs")
    heading, broken, nano, *rest = shown.out.splitlines()
    assert shown.code == 0 and heading.split() == ["run", "kind", "base", "step", "loss", "size", "saved", "state"]
    assert broken.startswith("runs/broken ") and broken.rstrip().endswith("DAMAGED")
    assert nano.split()[:6] == ["runs/nano", "pretrain", "10", "of", "20", "2.500"] and "19" in nano
    assert "runs/broken/config.json is damaged" in rest[-1]
    found = {each["path"]: each for each in json.loads(gpt("runs", "--json").out)}
    assert found["runs/nano"]["steps"] == 20 and found["runs/broken"]["state"] == "damaged"


def test_a_command_names_the_run_that_may_be_meant(gpt: Gpt) -> None:
    make(Path("runs/nano"), RECIPE)
    for command in ("chat", "info", "evaluate", "finetune"):
        assert "did you mean runs/nano?" in gpt(command, "nano").err, command
    assert "it holds runs: runs/nano" in gpt("info", "runs").err
