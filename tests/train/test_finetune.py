"""Finetuning: another front end to the same loop, from a run's weights to a run of its own."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import BudgetConfig, DataConfig, Recipe, override
from engine.errors import InputError
from engine.run import Run
from engine.runtime import Runtime
from engine.tokenizer import Tokenizer
from tests.train.conftest import Recorder, Train
from train.finetune import RATE, finetune, finetuning_recipe, recognise_base
from train.stage import Outcome
from train.tracking import read_metrics

Tune = Callable[..., tuple[Outcome, Recorder]]


@pytest.fixture
def base(train: Train, small: Recipe, tmp_path: Path) -> Run:
    train(override(override(small, "model.context", 64), "loop.save_every", 4), "base")
    return Run(tmp_path / "base")


@pytest.fixture
def chats(tmp_path: Path) -> DataConfig:
    rows = [{"prompt": f"say {word} {n}", "response": f"{word} {word}!"} for n in range(40) for word in ("fox", "owl")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(source=str(tmp_path / "chats.jsonl"))


@pytest.fixture
def tune(tmp_path: Path, base: Run, cpu: Runtime) -> Tune:
    """Finetune the base on some data in tmp_path/NAME."""

    def run(data: DataConfig, name: str = "tuned", *, steps: int = 4, **options: Any) -> tuple[Outcome, Recorder]:
        target, recorder = Run(tmp_path / name), Recorder()
        recipe = finetuning_recipe(base, base.find_checkpoint(), data)
        recipe = override(override(recipe, "loop.batch", 2), "loop.samples", 2)
        recipe = target.read_recipe() if options.get("resume") else recipe
        recipe = dataclasses.replace(recipe, budget=BudgetConfig(steps=steps))
        return finetune(recipe, target, cpu, recorder, **options), recorder

    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.find_checkpoint().tensors("model")


def test_a_chat_run_says_where_it_comes_from_and_keeps_the_tokenizer(
    tune: Tune, base: Run, chats: DataConfig, tmp_path: Path
) -> None:
    before = weights(base)
    outcome, recorder = tune(chats)
    run = Run(tmp_path / "tuned")
    recipe = run.read_recipe()
    assert (recipe.chat, recipe.base, recipe.base_step) == (True, str(base.path), 6)
    assert Tokenizer.load(run.tokenizer).fingerprint == Tokenizer.load(base.tokenizer).fingerprint
    assert any(line.startswith(f"base       {base.path}, step 6") for line in recorder.said)
    assert any(line.startswith("train      ") and "conversations" in line for line in recorder.said)
    assert math.isfinite(outcome.evaluation["loss"])
    assert "validation_loss" in read_metrics(run.metrics)[-1]
    assert str(base.path) in run.report.read_text()
    assert run.samples.read_text().count("\n> say ") == 2
    assert all(torch.equal(value, weights(base)[name]) for name, value in before.items())


def test_it_starts_from_the_weights_of_the_base(base: Run, chats: DataConfig, cpu: Runtime, tmp_path: Path) -> None:
    recipe = finetuning_recipe(base, base.find_checkpoint(), chats, rate=0.0)
    still = Run(tmp_path / "still")
    finetune(dataclasses.replace(recipe, budget=BudgetConfig(steps=1)), still, cpu, Recorder())
    assert all(torch.equal(value, weights(still)[name]) for name, value in weights(base).items())


def test_finetuning_lowers_the_loss_on_held_out_conversations(tune: Tune, chats: DataConfig) -> None:
    first, _ = tune(chats, "short", steps=1)
    last, _ = tune(chats, "long", steps=25)
    assert last.evaluation["loss"] < first.evaluation["loss"] - 0.1


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(
    tune: Tune, base: Run, chats: DataConfig, cpu: Runtime, tmp_path: Path
) -> None:
    _, whole = tune(chats, "run", steps=6)
    run = Run(tmp_path / "run")
    before = weights(run)
    shutil.rmtree(run.find_checkpoint().path)
    # With weights of its own, a run needs its base no more.
    shutil.rmtree(base.path)
    again = Recorder()
    finetune(run.read_recipe(), run, cpu, again, resume=True)
    assert again.losses() == whole.losses()[4:]
    assert all(torch.equal(value, weights(run)[name]) for name, value in before.items())


def test_a_base_is_known_by_its_weights_wherever_it_stands(tune: Tune, base: Run, chats: DataConfig) -> None:
    tune(chats, steps=1)
    run = Run(base.path.with_name("tuned"))
    recipe = run.read_recipe()
    assert recognise_base(recipe, run, base) == recipe
    moved = Run(base.path.rename(base.path.with_name("renamed")))
    assert recognise_base(recipe, run, moved).base == str(moved.path)
    # Gone, it is known by its place alone.
    assert recognise_base(recipe, run, base) == recipe
    with pytest.raises(InputError, match=r"did not begin with .*elsewhere, but with .*base; name its --out"):
        recognise_base(recipe, run, Run(base.path.with_name("elsewhere")))
    # As it is where the step has been pruned.
    moved.path.rename(base.path)
    shutil.rmtree(base.find_checkpoint().path)
    assert recognise_base(recipe, run, base) == recipe


def test_a_run_that_did_not_note_its_bases_weights_knows_it_by_name_and_step(
    tune: Tune, base: Run, chats: DataConfig
) -> None:
    tune(chats, steps=1)
    run = Run(base.path.with_name("tuned"))
    recipe = dataclasses.replace(run.read_recipe(), base="/gone/base", base_weights=None)
    assert recognise_base(recipe, run, base).base == str(base.path)
    with pytest.raises(InputError, match="did not begin with"):
        recognise_base(dataclasses.replace(recipe, base_step=5), run, base)


def test_another_run_in_the_place_of_the_base_is_refused_by_what_differs(
    tune: Tune, base: Run, chats: DataConfig, train: Train, small: Recipe, cpu: Runtime, tokenizer: Tokenizer
) -> None:
    tune(chats, steps=1)
    run = Run(base.path.with_name("tuned"))
    recipe = run.read_recipe()
    shutil.rmtree(base.path)
    train(override(override(small, "model.context", 64), "loop.seed", 1), "base")
    with pytest.raises(InputError, match=r"its weights at step 6 are others; bring back .* can go on without a base"):
        recognise_base(recipe, run, base)
    with pytest.raises(InputError, match=r"step-00000006 has other weights than those that .*fresh began with"):
        finetune(recipe, Run(base.path.with_name("fresh")), cpu, Recorder())
    tokenizer.save(base.tokenizer)
    with pytest.raises(InputError, match="it has another tokenizer"):
        recognise_base(recipe, run, base)
    base.write_recipe(override(base.read_recipe(), "model.blocks", 3))
    with pytest.raises(InputError, match="its model has another shape"):
        recognise_base(recipe, run, base)


def test_documents_continue_pretraining_with_the_tokenizer_of_the_base(tune: Tune, base: Run, tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("Speak, owl, speak! The night is long.\n\n" * 400)
    _, recorder = tune(DataConfig(source=str(tmp_path / "play.txt")))
    run = Run(tmp_path / "tuned")
    assert not run.read_recipe().chat
    assert Tokenizer.load(run.tokenizer).fingerprint == Tokenizer.load(base.tokenizer).fingerprint
    assert len(recorder.losses()) == 4


def test_prepared_data_of_another_tokenizer_is_refused(
    tune: Tune, base: Run, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    from train.data.shards import prepare
    from train.data.sources import open_source

    for split in ("train", "validation"):
        prepare(open_source("stories", limit=5), tokenizer, tmp_path / "other", split, workers=1)
    with pytest.raises(InputError, match="has another tokenizer than"):
        tune(DataConfig(source=str(tmp_path / "other")))


def test_rates_are_a_share_of_pretrainings_once(tune: Tune, base: Run, chats: DataConfig, tmp_path: Path) -> None:
    before = base.read_recipe().optimizer
    recipe = finetuning_recipe(base, base.find_checkpoint(), chats)
    assert recipe.optimizer.matrix_rate == pytest.approx(RATE * before.matrix_rate)
    assert recipe.optimizer.weight_decay == before.weight_decay
    tune(chats, steps=1)
    tuned = Run(tmp_path / "tuned")
    assert finetuning_recipe(tuned, tuned.find_checkpoint(), chats).optimizer == recipe.optimizer
    doubled = finetuning_recipe(base, base.find_checkpoint(), chats, rate=2.0).optimizer
    assert doubled.head_rate == 2 * before.head_rate


def test_a_model_of_another_shape_is_refused_but_not_another_context(
    base: Run, chats: DataConfig, cpu: Runtime, tmp_path: Path
) -> None:
    recipe = finetuning_recipe(base, base.find_checkpoint(), chats)
    recipe = dataclasses.replace(override(recipe, "loop.batch", 2), budget=BudgetConfig(steps=1))
    with pytest.raises(InputError, match="of another model: leave --set model"):
        finetune(override(recipe, "model.blocks", 3), Run(tmp_path / "deep"), cpu, Recorder())
    finetune(override(recipe, "model.context", 80), Run(tmp_path / "long"), cpu, Recorder())
