"""gpt demo: its commands are such as gpt knows, they run at the same time, and its report says what came of them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.main import get_command

from cli import demo_report
from cli.demo import commands, run_together
from cli.demo_report import write_demo_report
from cli.main import app
from engine.errors import InputError
from engine.tokenizer import Tokenizer
from rlhf.policy_metrics import BEST_OF_N, BEST_OF_N_GOLD
from rlhf.prompts import Prompt
from train.data.stories import story_conversations


def parse(words: list[str]) -> str:
    """The name of a command, whose options are all known and of their types."""
    command: Any = get_command(app)
    names: list[str] = []
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(command.context_class(command), words)
        names.append(name)
    command.make_context(names[-1], list(words))
    return " ".join(names)


@pytest.mark.parametrize("short", [False, True])
def test_the_demo_is_made_of_commands_that_gpt_knows(tmp_path: Path, short: bool) -> None:
    found = [
        [parse(words) for words in group.values()] for group in commands(tmp_path, 3, short=short, control=not short)
    ]
    # It learns to answer first requests, then later ones.
    assert found[:5] == [["train"], ["finetune"], ["finetune"], ["rlhf pairs"], ["reward", "rlhf dpo"]]
    assert found[5] == ["rlhf ppo", "rlhf grpo", *([] if short else ["rlhf ppo"])] and found[6] == ["rlhf best-of-n"]


def test_commands_run_together_and_one_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_together({"one": ["info", "--help"], "two": ["train", "--help"]}, tmp_path) > 0
    assert "Say what a run is" in (tmp_path / "one.log").read_text() and "gpt train --help" in capsys.readouterr().out
    with pytest.raises(InputError, match="gpt info nowhere failed"):
        run_together({"one": ["train", "--help"], "bad": ["info", "nowhere"]}, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_demo_that_is_stopped_waits_for_its_commands_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    saving = "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: None); "
    saving += "pathlib.Path(sys.argv[1]).touch(); signal.pause(); time.sleep(0.2); print('saved'); sys.exit(143)"
    starts: list[Any] = []

    def start(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
        starts.append(Popen([sys.executable, "-c", saving, str(tmp_path / command[-1])], **how))
        return starts[-1]

    def ask() -> None:
        while not ((tmp_path / "a").exists() and (tmp_path / "b").exists()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        if number is signal.SIGHUP:  # the shell's and the kernel's
            os.kill(os.getpid(), number)

    Popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    before = signal.getsignal(number)
    threading.Thread(target=ask).start()
    with pytest.raises(typer.Exit) as stopped:
        run_together({"one": ["a"], "two": ["b"]}, tmp_path)
    assert stopped.value.exit_code == 128 + number and signal.getsignal(number) is before
    assert [process.returncode for process in starts] == [143, 143]
    assert {(tmp_path / name).read_text() for name in ("one.log", "two.log")} == {"saved\n"}


def test_the_report_holds_every_method_over_all_seeds(tmp_path: Path) -> None:
    def point(gold: float, **more: Any) -> dict[str, Any]:
        return {"gold": gold, "reward": 1.0, "kl": 0.5, **more}

    def result(seed: int) -> dict[str, Any]:
        gain = {"gain_in_deviations": 0.5 + seed, "share_of_best_of_n": 0.3, "share_of_best_of_n_by_gold": 0.2}
        curve = [point(0.5, n=1), point(0.8, n=2)]
        return {
            "seconds": {"train": 60.0, "reward and dpo": 30.0},
            "reward_model": {"gold_accuracy": 0.7 + seed / 10},
            "methods": {"chat-ppo": point(0.6, **gain)},
            "turns": {"chat": [0.8, 0.79, 0.78, 0.81], "chat-ppo": [0.9 + seed / 50, 0.9, 0.91, 0.9]},
            "asked": ["Tell me a story", "Another ending"],
            "said": {"chat": [["no", 0.0], ["a sad one", 0.5]], "chat-ppo": [["yes", 1.0], ["a glad one", 0.75]]},
            BEST_OF_N: curve,
            BEST_OF_N_GOLD: curve,
        }

    table = write_demo_report(tmp_path, [result(0), result(1)])
    assert (
        "| chat-ppo | 0.600 (0.600 to 0.600) | 1.00 (1.00 to 1.00) | 0.50 (0.50 to 0.50) | 1.00 (0.50 to 1.50) "
        "| 0.30 (0.30 to 0.30) | 0.20 (0.20 to 0.20) |" in ("\n".join(table))
    )
    report = (tmp_path / "report.md").read_text()
    assert "1.5 minutes for each of 2 seeds" in report and "0.750 (0.700 to 0.800)" in report and "Tell me" in report
    # Later answers beside the first, of a model that goes on from its own.
    assert "| finetuned | 0.800 (0.800 to 0.800) | 0.790 (0.790 to 0.790) | 0.780 (0.780 to 0.780) | 0.810" in report
    assert "| chat-ppo | 0.910 (0.900 to 0.920) |" in report and "| -0.010 (-0.020 to 0.000) |" in report
    assert "> Another ending\n\n**chat** (0.50): a sad one\n\n**chat-ppo** (0.75): a glad one" in report
    assert (tmp_path / "frontier.png").exists()


def test_conversations_are_led_as_at_the_chat_and_every_answer_is_scored_by_what_was_asked_so_far(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    talks = [*islice(story_conversations("validation", turns=4), 24)]
    asked: list[list[int]] = []

    def answering(story: Callable[[int, int], str]) -> Any:
        def answer(model: None, prompts: list[Prompt], ends: frozenset[int], seed: int) -> Any:
            asked[:] = [[*prompt.ids] for prompt in prompts]
            answers = [[*tokenizer.encode(story(number, seed)), *ends] for number in range(len(prompts))]
            return SimpleNamespace(answers=answers)

        return answer

    monkeypatch.setattr(demo_report, "roll_out", answering(lambda number, turn: talks[number][turn].story))
    golds, said = demo_report.lead_talks(None, tokenizer, talks, 2000)  # type: ignore[arg-type]
    assert golds == pytest.approx([1.0] * 4, abs=0.01) and [text for text, _ in said] == [
        each.story for each in talks[0]
    ]
    # The last prompt holds its own answers before.
    assert tokenizer.decode(asked[0]).count(talks[0][2].story) == 1
    monkeypatch.setattr(demo_report, "roll_out", answering(lambda number, turn: talks[number][0].story))
    first, *later = demo_report.lead_talks(None, tokenizer, talks, 300)[0]  # type: ignore[arg-type]
    assert first > 0.99 and max(later) < 0.75
    assert max(map(len, asked)) <= 300
