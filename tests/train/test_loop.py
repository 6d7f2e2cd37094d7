"""The loop: resumes to the bit, keeps what it has, and says what goes wrong."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import checkpoint
from engine.config import BudgetConfig, Recipe, override, to_dict
from engine.processes import ALONE, Coordinator
from engine.run import Run
from engine.runtime import Runtime
from tests.train.conftest import stop_after
from train import loop, pretrain
from train.loop import Loop
from train.optimizer import rate_factor
from train.stage import TrainingError
from train.tracking import read_metrics

Train = Callable[..., Any]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def model_of(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    return found.tensors("model")


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(
    small: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, kind: str
) -> None:
    small = override(small, "optimizer.kind", kind)
    train(small, "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        outcome, _ = train(small, "stopped")
    assert (outcome.step, outcome.stopped_by) == (stop, signal.SIGINT)
    outcome, recorder = train(small, "stopped", resume=True)
    assert outcome.step == 6 and outcome.stopped_by is None
    assert any(f"after step {stop}" in line for line in recorder.said)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    whole, resumed = model_of(tmp_path / "whole"), model_of(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_finishes_the_step_and_saves(
    small: Recipe, train: Train, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    stop_after(monkeypatch, 2, number)
    outcome, recorder = train(small)
    assert outcome.stopped_by is number and outcome.checkpoint.step == 2
    assert any(number.name in line for line in recorder.said)
    outcome.checkpoint.verify()
    assert signal.getsignal(number) is before


def test_a_closed_terminal_stops_no_run_under_nohup(
    small: Recipe, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_after(monkeypatch, 2, signal.SIGHUP)
        outcome, _ = train(small)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert outcome.stopped_by is None and outcome.step == 6


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_what_comes_after_a_warning_does_not_end_the_save(first: signal.Signals) -> None:
    """The shell and the kernel both send SIGHUP; a scheduler warns, and later asks."""
    coordinator, earlier = Coordinator(ALONE), signal.getsignal(signal.SIGTERM)
    with coordinator.listening():
        before = signal.getsignal(signal.SIGTERM)
        os.kill(os.getpid(), first)
        if first is signal.SIGTERM:  # of a person who means it
            assert signal.getsignal(signal.SIGTERM) is earlier
            return
        os.kill(os.getpid(), first)
        assert signal.getsignal(signal.SIGTERM) is before
        os.kill(os.getpid(), signal.SIGTERM)
    assert coordinator.stop is signal.SIGTERM


def test_a_larger_budget_goes_on_where_the_smaller_ended(small: Recipe, train: Train) -> None:
    train(small)
    outcome, _ = train(dataclasses.replace(small, budget=BudgetConfig(steps=8)), resume=True)
    assert outcome.step == 8


def test_minutes_fit_the_schedule_to_the_time(small: Recipe, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock on which every step takes half a second, and what lies between them nothing.
    clock = [0.0]

    def tick(self: Loop, step: int) -> None:
        clock[0] += 0.5

    monkeypatch.setattr(Coordinator, "now", lambda self: clock[0])
    monkeypatch.setattr(Loop, "on_step", tick)
    outcome, recorder = train(dataclasses.replace(small, budget=BudgetConfig(minutes=0.1)))
    trained = [line for line in recorder.logged if "loss" in line]
    assert outcome.step == 12 and outcome.checkpoint.values("state")["seconds"] == 6.0
    schedule = small.schedule
    assert [line["rate"] for line in trained] == [rate_factor(schedule, step / 12) for step in range(12)]


def test_bits_per_byte_count_only_what_is_learnt() -> None:
    lengths = torch.tensor([0, 1, 3])
    assert loop.spelled_bytes(torch.tensor([0, 1, 2, -100]), lengths) == int(lengths[:3].sum())


def test_accumulated_micro_batches_train_like_the_whole_batch(small: Recipe, train: Train, tmp_path: Path) -> None:
    small = override(small, "optimizer.kind", "adamw")
    train(small, "whole")
    train(override(small, "loop.micro_batch", 2), "halves")
    # Not to the bit: a document at the cut between micro-batches does not see its own beginning.
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=0.02)


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(
    small: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    honest = loop.packed_loss

    def greedy(model: Any, batch: Any) -> torch.Tensor:
        sizes.append(len(batch.tokens))
        if len(batch.tokens) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        return honest(model, batch)

    train(small, "whole")
    monkeypatch.setattr(loop, "packed_loss", greedy)
    outcome, recorder = train(small)
    parts = outcome.checkpoint.values("state")["parts"]
    assert outcome.step == 6 and parts >= 4 and sizes[0] == 128 and sizes[-1] <= 32
    assert 1 < sum("out of memory: from now on up to" in line for line in recorder.said) <= math.log2(parts)
    # No sequence is cut, so what is learnt stays the same.
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    # What was learnt to fit is remembered.
    sizes.clear()
    outcome, _ = train(dataclasses.replace(small, budget=BudgetConfig(steps=7)), resume=True)
    assert max(sizes) <= 32 and sum(sizes) == 128 and outcome.checkpoint.values("state")["parts"] == parts


def test_memory_that_is_never_enough_ends_the_run_with_a_message(
    small: Recipe, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hopeless(model: Any, batch: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(loop, "packed_loss", hopeless)
    with pytest.raises(TrainingError, match=r"even with \d\d tokens at a time, which cannot be cut"):
        train(small)


def spoil(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Make the loss NaN in these calls."""
    honest, calls = loop.packed_loss, iter(range(1000))

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return honest(model, batch) * (math.nan if next(calls) in steps else 1.0)

    monkeypatch.setattr(loop, "packed_loss", loss)


def test_a_step_without_a_finite_loss_is_skipped_and_counted(
    small: Recipe, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(2, 4))
    outcome, recorder = train(small)
    assert outcome.step == 6 and outcome.checkpoint.values("state")["skipped"] == 2
    assert [math.isfinite(loss) for loss in recorder.losses()] == [True, True, False, False, True, True]
    assert math.isfinite(outcome.evaluation["loss"])
    assert sum("is skipped" in line for line in recorder.said) == 2


def test_many_steps_without_a_finite_loss_stop_the_run_and_keep_the_good_checkpoint(
    small: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(4, 1000))
    recipe = dataclasses.replace(override(small, "loop.save_every", 3), budget=BudgetConfig(steps=50))
    with pytest.raises(TrainingError, match=r"5 steps in a row.*kept \(.*step-0000000\d\)"):
        train(recipe)
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.step <= 6
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors("model").values())


def test_the_checkpoint_is_saved_before_evaluation_and_sampling(
    small: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ArithmeticError("evaluation broke down")

    monkeypatch.setattr(pretrain, "evaluate_loss", broken)
    with pytest.raises(ArithmeticError):
        train(override(small, "loop.evaluate_every", 4))
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.step == 4


def test_an_evaluation_that_runs_out_of_memory_is_left_out(
    small: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("evaluation took it all")

    monkeypatch.setattr(pretrain, "evaluate_loss", greedy)
    outcome, recorder = train(override(small, "loop.evaluate_every", 4))
    assert outcome.step == 6 and outcome.evaluation == {}
    assert sum("out of memory while evaluating" in line for line in recorder.said) == 2
    assert (tmp_path / "run" / "report.md").exists()


def test_a_resume_past_damaged_checkpoints_keeps_what_it_saves(small: Recipe, train: Train, tmp_path: Path) -> None:
    small = override(override(small, "loop.save_every", 2), "loop.keep", 3)
    train(small)
    folder = tmp_path / "run" / "checkpoints"
    for step in (4, 6):
        (folder / f"step-{step:08d}" / "state.json").write_text("{}")
    outcome, recorder = train(override(small, "loop.keep", 1), resume=True)
    assert any("after step 2" in line for line in recorder.said)
    assert outcome.step == 6
    outcome.checkpoint.verify()
    assert {path.name for path in folder.glob("damaged-*")} == {"damaged-step-00000004", "damaged-step-00000006"}


def test_evaluations_are_recorded_with_their_checkpoints(small: Recipe, train: Train, tmp_path: Path) -> None:
    outcome, recorder = train(override(small, "loop.evaluate_every", 2))
    evaluated = [line for line in recorder.logged if "validation_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4, 6]
    assert outcome.checkpoint.evaluation() == outcome.evaluation
    assert len(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")) == 2
    assert (tmp_path / "run" / "samples.md").read_text().count("## Step") == 3


def test_half_precision_scales_its_loss_and_resumes_to_the_bit(
    small: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Runtime(torch.device("cpu"), "fp16")
    small = dataclasses.replace(small, budget=BudgetConfig(steps=30))
    outcome, recorder = train(small, "whole", runtime=half)
    assert outcome.checkpoint.values("state")["scaler"]["scale"] > 1
    assert recorder.losses()[-1] < recorder.losses()[0] - 0.3
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        train(small, "stopped", runtime=half)
    train(small, "stopped", runtime=half, resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_long_run_is_announced_with_its_way_out(small: Recipe, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LONG_RUN_SECONDS", 1e-6)
    _, recorder = train(dataclasses.replace(small, budget=BudgetConfig(steps=12)))
    assert any("hours on this machine" in line and "--minutes" in line for line in recorder.said)


def test_metrics_hold_every_step_once_after_a_resume(
    small: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train(override(small, "loop.save_every", 2))
    # As after a crash: the newest checkpoint is older than the newest line, and that line is cut short.
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    (newest.path / "model.safetensors").write_bytes(b"")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    _, recorder = train(override(small, "loop.save_every", 2), resume=True)
    assert any("model.safetensors is missing, cut short or changed" in line for line in recorder.said)
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stop", [None, 5])
def test_the_last_step_is_always_logged_and_tokens_are_those_seen_so_far(
    small: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int | None
) -> None:
    small = override(override(small, "loop.log_every", 4), "loop.micro_batch", 2)
    with monkeypatch.context() as patch:
        if stop:
            stop_after(patch, stop)
        train(small)
    if stop:
        train(small, resume=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [1, 4, *([stop] if stop else []), 6, 6]
    assert [(line["step"], line["tokens"]) for line in lines] == [(step, 128 * step) for step in steps]
    assert all(line["memory"] > 2**20 for line in lines if "loss" in line)
    assert "6 steps, 768 tokens" in (tmp_path / "run" / "report.md").read_text()


# Imports once, then forks a training process for every line it reads: starting Python twenty times would take a minute.
NURSERY = """
import json, os, pathlib, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from engine.config import from_dict
from engine.run import Run
from engine.runtime import Runtime
from engine.runtime import choose
import safetensors.torch
from tests.train.conftest import Recorder
from train.pretrain import pretrain
class Loud(Recorder):
    def log(self, metrics):
        print("step", flush=True)
recipe, run = from_dict(json.loads(sys.argv[2])), Run(pathlib.Path(sys.argv[3]))
for _ in sys.stdin:
    child = os.fork()
    if not child:
        pretrain(recipe, run, choose("cpu", "fp32"), Loud(), resume=True)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def test_killed_twenty_times_at_random_it_always_resumes_and_ends_as_if_undisturbed(
    small: Recipe, train: Train, tmp_path: Path
) -> None:
    recipe = override(override(small, "loop.save_every", 3), "loop.samples", 0)
    recipe = dataclasses.replace(recipe, budget=BudgetConfig(steps=500))
    run = tmp_path / "killed"
    Run(run).write_recipe(recipe)
    command = [sys.executable, "-c", NURSERY, str(Path(__file__).parents[2]), json.dumps(to_dict(recipe)), str(run)]
    moments, reached = random.Random(5), [0]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as nursery:
        assert nursery.stdin is not None and nursery.stdout is not None
        for number in range(20):
            nursery.stdin.write("\n")
            child = int(nursery.stdout.readline())
            # Mostly in the middle of training, which saves at every third step; sometimes before it begins.
            if number % 5:
                assert nursery.stdout.readline() == "step\n"
            time.sleep(moments.uniform(0.0, 0.4))
            os.kill(child, signal.SIGKILL)
            # A line that was being written when its process was killed may stand before this one.
            while not nursery.stdout.readline().endswith("gone\n"):
                pass
            found = checkpoint.checkpoints(run / "checkpoints")
            for each in found:
                each.verify()
            reached.append(found[-1].step if found else 0)
        nursery.stdin.close()
    assert reached == sorted(reached)
    assert 0 < reached[-1] < 500
    # Like the killed processes: sums are taken in another order with another number of threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outcome, _ = train(recipe, "killed", resume=True)
        train(recipe, "undisturbed")
    finally:
        torch.set_num_threads(threads)
    assert outcome.step == 500
    assert losses(run) == losses(tmp_path / "undisturbed")
