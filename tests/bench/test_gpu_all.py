"""bench/gpu_all.sh: every step runs, whatever becomes of the others, and the end says how each went."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_all.sh"


def test_a_step_that_fails_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *bench-attention*) echo "cannot"; exit 3;; *) echo "ran $*";; esac\n')
    python.chmod(0o755)
    results = tmp_path / "new" / "results"
    environment = {**os.environ, "PYTHON": str(python)}
    command = ["bash", str(SCRIPT), str(results)]
    done = subprocess.run([*command, "tests", "kernels"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    summary = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line.endswith(" s")}
    assert summary == {
        "tests-gpu": "0",
        "tests-kernels": "0",
        "attention": "3",
        "attention-more": "3",
        "attention-flex": "3",
        "layernorm": "0",
        "cross-entropy": "0",
        "decode-attention": "0",
        "decode-large": "0",
    }
    assert (results / "attention.log").read_text() == "cannot\n"
    assert "bench-decode large" in (results / "decode-large.log").read_text()
    done = subprocess.run([*command, "training"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--context 2048" in (results / "train-large-2048.log").read_text()
    assert subprocess.run([*command, "neither"], env=environment, capture_output=True).returncode == 2


def test_missing_packages_are_said_and_the_tests_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *hypothesis*) exit 1;; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(["bash", str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "MISSING: the Python package hypothesis" in done.stdout
    assert "tests: SKIPPED" in done.stdout and "attention" in done.stdout
