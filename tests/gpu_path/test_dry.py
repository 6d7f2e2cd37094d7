"""bench/gpu_all.py on a GPU that is not there: each step starts, compiles its kernels, and writes what says of itself
that it is no result."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_all import RESULTS, ROOT, STEPS
from engine.config import PRESETS
from engine.planning import MACHINES, measured_rate
from tests import gpu_path

NOT_REAL = "no GPU (sm_90, times are not real)"
# Whoever is ours has figures; peers want what is not there.
OURS = {"ours", "paged", "without graphs", "ours, AdamW", "ours, fp32"}
PEERS = "Inductor compiles for a GPU that is there|No viable backend|`torch.device` context manager"
COMMANDS = [step for step in STEPS if step.command.startswith("cli ")]
TESTS = [step for step in STEPS if step not in COMMANDS]


@pytest.mark.skipif(bool(gpu_path.why_not()), reason=str(gpu_path.why_not()))
@pytest.mark.parametrize("half", [0, 1])
def test_each_step_of_a_day_on_a_gpu_starts_and_writes_what_is_no_result(half: int, tmp_path: Path) -> None:
    # One process for many steps: to import torch takes longer than most of them.
    steps = COMMANDS[half::2]
    command = [sys.executable, "-m", "tests.gpu_path.dry", str(tmp_path), *(step.name for step in steps)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "dry.json").read_text())
    assert list(report) == [step.name for step in steps]
    for name, found in report.items():
        log = (tmp_path / name / "log.txt").read_text()
        assert found["exit"] == 0 and found["problems"] == {} and found["kernels"], f"{name}: {found}\n{log}"
        if name == "train-nano":
            assert (tmp_path / name / "run" / "metrics.jsonl").exists()
            continue
        (path,) = (tmp_path / name).glob("*.json")
        result = json.loads(path.read_text())
        assert result["device"] == NOT_REAL and "times-are-not-real" in path.name
        for who, reason in reasons(result):
            assert who not in OURS and re.search(PEERS, reason), f"{name}: {who}: {reason}"
        if name.startswith("tune-"):
            assert [f"tune-{each['head_dim']}-{each['kernel']}" for each in result["tuned"]][:1] == [name]
            assert len({each["kernel"] for each in result["tuned"]}) == 1
        for machine in MACHINES:
            assert all(measured_rate(preset, "bf16", machine, path.parent) is None for preset in PRESETS.values())


def reasons(value: Any, who: str = "") -> Iterator[tuple[str, str]]:
    """Yield who has no figure in a result, and why."""
    if isinstance(value, dict) and "reason" in value:
        yield who, value["reason"]
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from reasons(each, key)
    elif isinstance(value, list):
        for each in value:
            yield from reasons(each, who)


@pytest.mark.parametrize("step", TESTS, ids=lambda step: step.name)
def test_the_tests_of_a_day_on_a_gpu_are_there(step: Any, tmp_path: Path) -> None:
    arguments = step.arguments(tmp_path)
    assert all((ROOT / each).is_dir() for each in arguments if each.startswith("tests/"))
    command = [sys.executable, "-m", *arguments, "--collect-only", "--ignore-glob=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr


def test_no_result_is_of_a_gpu_that_is_not_there() -> None:
    assert [
        path.name for path in RESULTS.iterdir() if "not-real" in path.name or b"not real" in path.read_bytes()
    ] == []
