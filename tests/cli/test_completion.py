"""What the Tab key offers: commands, options, runs, presets, data, settings; and through bash itself."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Gpt
from tests.engine.test_runs import make

ROOT = Path(__file__).parents[2]


@pytest.fixture
def offered(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    for name in ("nano", "nano-chat", "demo/ppo", "with space", "quo'te", "$(touch x)"):
        (Path("runs") / name).mkdir(parents=True)
        (Path("runs") / name / "config.json").write_text('{"recipe": {}}')
    make(Path("here"))

    def complete(line: str, shell: str = "bash") -> list[str]:
        monkeypatch.setenv("_GPT_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("COMP_WORDS", "\n".join(line.split(" ")))
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        return gpt(*line.split()[1:]).out.split()

    return complete


RUNS = ["runs/demo/ppo", "runs/nano", "runs/nano-chat"]
WORDS = {
    "gpt tra": ["train"],
    "gpt rlhf ": ["ppo", "grpo", "dpo", "best-of-n", "pairs"],
    "gpt train nano --epo": ["--epochs"],
    "gpt train ": ["nano", "tiny", "large"],
    "gpt train tiny --data ti": ["tinystories", "tinystories-instruct"],
    "gpt train tiny --set schedule.": [f"schedule.{name}=" for name in ("shape", "warmup", "decay", "floor")],
    "gpt train tiny --out run": [],
    "gpt chat ": [*RUNS, "here"],
    "gpt info runs/n": RUNS[1:],
    "gpt chat nowhere/n": [],
    "gpt runs r": [],
    "gpt evaluate here --against r": RUNS,
    "gpt rlhf best-of-n here runs/nano-": ["runs/nano-chat"],
    "gpt rlhf grpo here --reward runs/d": ["runs/demo/ppo"],
    "gpt evaluate here --precision ": ["auto", "fp32", "bf16", "fp16"],
    "gpt generate here --checkpoint ": ["latest", "best"],
}


def test_each_word_is_completed_with_what_may_stand_there(offered: Callable[..., list[str]]) -> None:
    for line, words in WORDS.items():
        assert offered(line) == words, line
    assert "$" not in "".join(offered("gpt chat runs/", "zsh")) and offered("gpt info runs/nano-", "fish") == RUNS[2:]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash is here")
def test_bash_completes_by_the_script_that_is_shown(tmp_path: Path) -> None:
    script = tmp_path / "gpt"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m cli "$@"\n')
    script.chmod(0o755)
    lines = (
        'source <(gpt --show-completion); COMP_WORDS=(gpt tok); COMP_CWORD=1; _gpt_completion gpt; echo "$COMPREPLY"'
    )
    done = subprocess.run(
        ["bash", "-c", f'PATH="{tmp_path}:$PATH"\n{lines}'], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("tokenizer\n", "")
