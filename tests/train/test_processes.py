"""Many processes learn what one does, save what any number of them can go on with, and never wait for ever."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import checkpoint
from engine.config import BudgetConfig, Recipe, override, preset
from engine.errors import InputError
from engine.processes import Processes
from engine.runtime import Runtime
from tests.train.team import said, start, train_on
from train import parallel
from train.data.shards import TokenShards
from train.loop import Loop
from train.tracking import read_metrics

STEPS = 50


def change(recipe: Recipe, settings: Mapping[str, object]) -> Recipe:
    for name, value in settings.items():
        recipe = override(recipe, name, value)
    return recipe


@pytest.fixture(scope="module")
def steady(small: Recipe) -> Recipe:
    """A rate that does not depend on the budget: a run that goes on with a larger one is the same run."""
    settings = {"schedule.warmup": 0.0, "schedule.decay": 0.0, "optimizer.matrix_rate": 0.01, "loop.batch": 8}
    # A text is counted as far as the budget reaches. And normuon makes more of what other sums round off.
    tested_apart = {"model.start": "local", "optimizer.kind": "muon"}
    return change(small, settings | tested_apart | {"loop.samples": 0})


def for_steps(recipe: Recipe, steps: int) -> Recipe:
    return dataclasses.replace(recipe, budget=BudgetConfig(steps=steps))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def alone(steady: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    train_on(for_steps(steady, STEPS), run, 1)
    return run


@pytest.mark.parametrize(("count", "shard"), [(2, False), (4, False), (2, True)])
def test_the_losses_do_not_depend_on_the_number_of_processes(
    count: int, shard: bool, steady: Recipe, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    told = train_on(override(for_steps(steady, STEPS), "loop.shard", shard), run, count)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    one, many = (read_metrics(each / "metrics.jsonl") for each in (alone, run))
    for name in ("bits_per_byte", "tokens", "epoch", "gradient_norm", "validation_loss"):
        assert [line.get(name, 0) for line in many] == pytest.approx([line.get(name, 0) for line in one], rel=1e-2)
    assert len(many[0]["process_tokens_per_second"]) == count and many[0]["straggling"] >= 1
    assert all(each["evaluation"] == told[0]["evaluation"] for each in told)
    how = "a share of the model on each (FSDP)" if shard else "the model on each (DDP)"
    assert any(line.startswith(f"processes  {count}, {how}: ") for line in told[0]["said"])


@pytest.mark.parametrize("shard", [False, True])
def test_processes_begin_with_the_same_bigrams_and_normuon_treats_a_shared_table_as_a_whole_one(
    shard: bool, steady: Recipe, tmp_path: Path
) -> None:
    settings = {"model.start": "bigrams", "optimizer.kind": "normuon", "loop.shard": shard}
    recipe = change(for_steps(steady, 6), settings)
    for run, count in (("alone", 1), ("many", 2)):
        train_on(recipe if count > 1 else override(recipe, "loop.shard", None), tmp_path / run, count)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def test_a_model_with_a_tied_head_and_shared_key_heads_learns_the_same_when_sharded(
    steady: Recipe, tmp_path: Path
) -> None:
    family = {"norm": "rms", "mlp": "gated", "mlp_width": 24, "key_heads": 1, "tied": True, "qk_norm": True}
    recipe = for_steps(change(steady, {f"model.{name}": value for name, value in family.items()}), 6)
    for count, folder in ((1, "alone"), (2, "sharded")):
        train_on(override(recipe, "loop.shard", count > 1), tmp_path / folder, count)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_what_some_processes_saved_any_other_number_goes_on_with(steady: Recipe, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage, (count, shard) in enumerate([(1, False), (2, False), (4, True), (2, True), (1, False)], 1):
        # Also of another shape: in micro-batches, of which the last alone sends gradients, and computed twice.
        shape = {"loop.shard": shard, "loop.micro_batch": 4, "loop.checkpoint_activations": stage == 4}
        train_on(change(for_steps(steady, 4 * stage), shape), run, count)
        found = checkpoint.latest(run / "checkpoints")
        assert found is not None and found.step == 4 * stage
        shares = sorted(file.name for file in found.path.glob("optimizer*"))
        of_many = [f"optimizer-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        assert shares == (["optimizer.safetensors"] if count == 1 else of_many)
        assert {file.suffix for file in found.path.iterdir()} == {".safetensors", ".json"}
    train_on(override(for_steps(steady, 20), "loop.micro_batch", 4), tmp_path / "undisturbed", 1)
    assert losses(run) == pytest.approx(losses(tmp_path / "undisturbed"), rel=1e-5)


def in_many_parts(rank: int) -> None:
    parallel.lay_out = lambda recipe, runtime: parallel.Layout(True, 128)


def test_processes_that_share_a_model_take_as_many_parts_however_theirs_can_be_cut(
    steady: Recipe, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # As many as there are sequences, and one process has fewer of them than the other.
    train_on(for_steps(steady, 4), run, 2, trick=in_many_parts)
    assert losses(run) == pytest.approx(losses(alone)[:4], rel=1e-5)


def test_each_process_reads_its_share_of_a_stream_and_goes_on_with_it(
    steady: Recipe, prepared: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "\n".join(json.dumps({"text": f"The fox number {n} " + "ran and " * (n % 40)}) for n in range(200))
    )
    settings = {"data.source": str(texts), "data.stream": True, "data.tokenizer": str(prepared)}
    recipe, whole, stopped = change(steady, settings), tmp_path / "whole", tmp_path / "stopped"
    train_on(for_steps(recipe, 8), whole, 2)
    for steps in (3, 8):
        train_on(for_steps(recipe, steps), stopped, 2)
    assert losses(stopped) == losses(whole)
    assert read_metrics(whole / "metrics.jsonl")[0]["tokens"] == recipe.tokens_per_step
    workers = start(for_steps(recipe, 9), whole, 1)
    workers[0].join(60)
    assert "another number of processes: it was 2, now it is 1" in said(whole, 0)["failure"]


def after_step(number: int, act: Callable[[], None]) -> None:
    def watch(self: Loop, step: int) -> None:
        if step == number:
            act()

    Loop.on_step = watch  # type: ignore[method-assign]


def interrupted(rank: int) -> None:
    if rank == 1:
        after_step(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def test_a_signal_to_one_process_stops_all_after_the_same_step(steady: Recipe, tmp_path: Path) -> None:
    told = train_on(for_steps(steady, 6), tmp_path / "run", 2, trick=interrupted)
    assert [each["step"] for each in told] == [4, 4]
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.step == 4


def damaged_data(rank: int) -> None:
    """Let the other process alone read a token that cannot be."""
    honest = TokenShards._ids

    def read(self: TokenShards, document: int, offset: int, count: int) -> Any:
        if rank == 1 and document == 20:
            self.vocab_size = 1
        return honest(self, document, offset, count)

    TokenShards._ids = read  # type: ignore[method-assign]


def test_what_one_process_finds_in_the_data_is_said_by_all(steady: Recipe, tmp_path: Path) -> None:
    workers = start(for_steps(steady, 60), tmp_path / "run", 2, trick=damaged_data)
    for worker in workers:
        worker.join(60)
    for rank in range(2):
        failure = said(tmp_path / "run", rank)["failure"]
        assert failure.startswith("InputError: ") and "00000.tokens is damaged: document 21 of it holds at" in failure


def asleep(rank: int) -> None:
    if rank == 1:
        after_step(2, lambda: time.sleep(1000))


def test_a_process_that_hangs_is_named_with_its_step_and_what_the_others_wait_for(
    steady: Recipe, tmp_path: Path
) -> None:
    recipe = override(for_steps(steady, 6), "loop.timeout_minutes", 0.05)
    workers = start(recipe, tmp_path / "run", 2, trick=asleep)
    workers[0].join(60)
    workers[1].kill()
    workers[1].join()
    assert workers[0].exitcode == 1
    failure = said(tmp_path / "run", 0)["failure"]
    assert failure.startswith("LostProcessError: process 0 of 2 lost the others") and "imed out" in failure
    assert "process 0 was at step 3, all-gather of counts of targets" in failure
    assert "process 1 was at step 2, all-gather of metrics" in failure


@pytest.mark.parametrize(
    ("memory", "chosen"),
    [(80, (False, 1)), (20, (False, 2)), (5, (True, 8)), (0.001, (True, 32))],
)
def test_what_does_not_fit_by_estimate_is_cut_and_then_sharded(
    memory: float, chosen: tuple[bool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "device_memory", lambda runtime: int(memory * 2**30))
    runtime = Runtime(torch.device("cpu"), "bf16", Processes(0, 8))
    recipe = override(preset("large"), "loop.batch", 256)
    layout = parallel.lay_out(recipe, runtime)
    assert (layout.shard, layout.parts) == chosen
    assert parallel.lay_out(override(recipe, "loop.shard", True), runtime).shard
    assert not parallel.lay_out(override(recipe, "loop.shard", False), runtime).shard
    if layout.shard:
        with pytest.raises(InputError, match="cannot be trained with --precision fp16"):
            parallel.lay_out(recipe, dataclasses.replace(runtime, precision="fp16"))


def test_a_step_alone_is_cut_before_a_cpu_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU that is out of memory refuses nothing: the process is killed. A GPU refuses, and the step is then cut.
    monkeypatch.setattr(parallel, "free_memory", lambda device: 20 * 2**30)
    recipe = override(override(preset("large"), "loop.batch", 64), "loop.shard", True)
    cut = parallel.lay_out(recipe, Runtime(torch.device("cpu"), "bf16"))
    assert (cut.shard, cut.parts) == (False, 4) and cut.description.startswith("memory     micro-batches in 4 parts")
    for alone in (Runtime(torch.device("cpu"), "bf16"), Runtime(torch.device("cuda"), "bf16")):
        fits = recipe if alone.device.type == "cuda" else preset("nano")
        assert parallel.lay_out(fits, alone) == parallel.Layout()
