"""The wheel works where there is no checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_installed_wheel_trains(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # From a copy: a build leaves its own files behind, and an older one's would enter the wheel.
    source = tmp_path / "source"
    kept = shutil.ignore_patterns(".*", "runs", "build", "tests", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=kept)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in run(sys.executable, "-c", "import cli, engine, train.data; print(cli.__file__)")
    gpt = str(site / "bin" / "gpt")
    assert "Train a model from text" in run(gpt, "--help")
    small = ["--set", "data.final_evaluation_tokens=2000", "--set", "data.evaluation_tokens=2000"]
    assert "report" in run(gpt, "train", "nano", "--steps", "2", *small)
    assert (work / "runs" / "nano" / "checkpoints" / "step-00000002" / "manifest.json").exists()
