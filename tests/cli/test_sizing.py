"""gpt train --depth, --params, --hours, or a time alone: what follows from one number, why, and what wins over it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from cli import sizing
from cli.options import Size
from engine import laws, pace
from engine.config import ORIGIN, PRESETS, ModelConfig, Recipe, override
from engine.errors import InputError
from engine.planning import MACHINES, Machine, Rate
from engine.runtime import Runtime
from tests.cli.conftest import SMALL, Gpt


def slow(model: ModelConfig, seconds: float) -> float:
    """A machine of 0.1 TFLOP/s."""
    return seconds * 1e11 / model.flops_per_token


def derived(size: Size, **asked: object) -> tuple[Recipe, list[str]]:
    def adjust(recipe: Recipe) -> Recipe:
        budget = {each.partition(".")[2]: value for each, value in asked.items() if each.startswith("budget.")}
        if budget:
            recipe = dataclasses.replace(recipe, budget=type(recipe.budget)(**budget))  # type: ignore[arg-type]
        for name, value in asked.items():
            recipe = recipe if name.startswith("budget.") else override(recipe, name, value)
        return recipe

    return sizing.derive("x", size, asked.get("budget.minutes"), slow, adjust)  # type: ignore[arg-type]


def test_a_number_of_blocks_or_of_parameters_gives_a_whole_recipe_with_its_reasons() -> None:
    recipe, lines = derived(Size(depth=6))
    tokens = recipe.budget.tokens
    assert recipe.model == laws.shape(6) and tokens == laws.optimal_tokens(recipe.model, "stories")
    assert recipe.loop.batch == laws.batch(tokens, 256)
    assert recipe.optimizer == laws.optimizer(recipe.model, recipe.tokens_per_step, tokens)
    assert [line.split()[0] for line in lines] == ["size", "width", "heads", "vocabulary", "batch", "length"]
    assert "192: 32 for each block" in lines[1] and "7,168: 4,096 x (6 / 4)^1.5" in lines[3]
    assert f"{recipe.loop.batch}: rows of 256: 2,048 x" in lines[4] and "best use of work" in lines[5]
    known = derived(Size(params=f"{recipe.model.parameters}"))
    assert known[0] == recipe and "the nearest to" in known[1][0]


def test_what_is_asked_for_wins_and_the_rest_follows_it() -> None:
    asked = {"loop.batch": 24, "model.heads": 8, "model.width": 256, "optimizer.head_rate": 0.5}
    recipe, lines = derived(Size(depth=6), **asked, **{"budget.tokens": 20_000_000})
    follows = laws.optimizer(recipe.model, 24 * 256, 20_000_000)
    assert (recipe.model.width, recipe.loop.batch, recipe.budget.tokens) == (256, 24, 20_000_000)
    assert recipe.optimizer == dataclasses.replace(follows, head_rate=0.5)
    assert "256: as asked; by the law 192" in lines[1] and "20,000,000 tokens: as asked" in lines[5]
    steps, _ = derived(Size(depth=6), **{"budget.steps": 1000})
    assert steps.loop.batch == pytest.approx(laws.batch(1000 * steps.tokens_per_step, 256), abs=1)
    assert "ASSUMED" in derived(Size(depth=6), **{"budget.epochs": 2.0})[1][5]


def test_a_time_alone_takes_the_size_that_ends_best_and_more_time_a_larger_one() -> None:
    sizes = []
    for minutes in (3.0, 30.0, 300.0, 30_000.0):
        recipe, lines = derived(Size(), **{"data.source": "tinystories", "budget.minutes": minutes})
        sizes.append(recipe.model.blocks)
        tokens = slow(recipe.model, 60 * minutes)
        assert "end best" in lines[0] and f"{minutes:g} minutes at" in lines[5] and recipe.budget.minutes == minutes
        for other in (sizes[-1] - 1, sizes[-1] + 1):
            model = laws.shape(other)
            beside = laws.forecast(model, slow(model, 60 * minutes), "tinystories")
            chosen = laws.forecast(recipe.model, tokens, "tinystories")
            assert other < laws.LEAST_BLOCKS or beside is None or chosen is None or chosen.middle <= beside.middle
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_tokens_of_a_time_are_those_of_the_plan_and_none_where_it_does_not_fit() -> None:
    asked = []

    def machine(recipe: Recipe) -> tuple[Machine, Rate, str]:
        asked.append((recipe.name, recipe.model))
        return MACHINES["4090"], Rate(6e13, "a test"), "bf16"

    learnt = sizing.learning_on(machine)
    assert learnt(laws.shape(4), 3600) > 10 * learnt(laws.shape(16), 3600) > 0
    assert learnt(laws.shape(100), 3600) == 0
    assert learnt(laws.shape(4), 60) < learnt(laws.shape(4), 3600)
    assert asked == [(name, laws.shape(depth)) for name, depth in (("nano", 4), ("tiny", 16), ("large", 100))]


def test_a_cpu_is_as_fast_at_a_size_as_it_was_just_now(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Runtime(torch.device("cpu"), "fp32")
    monkeypatch.setattr(pace, "training_flops", lambda machine, work: 1e5 * work)
    for recipe in (PRESETS["nano"], dataclasses.replace(PRESETS["nano"], model=laws.shape(7))):
        machine, rate, precision = sizing.this_machine(here, override(recipe, "precision", "fp32"))
        assert machine.name == "CPU" and rate.flops == 1e5 * recipe.model.flops_per_token and precision == "fp32"
        assert "timed just now" in rate.source


@pytest.mark.parametrize(
    ("text", "number"), [("30M", 3e7), ("1.5B", 1.5e9), ("800k", 8e5), ("3e7", 3e7), ("2000", 2e3)]
)
def test_a_number_of_parameters_is_read_as_people_write_it(text: str, number: float) -> None:
    assert sizing.count(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "M", "30m", "-3M", "nan", "1e400", "3..0M", "12", "1e13", "30 M"])
def test_what_is_no_number_of_parameters_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="such as 30M"):
        sizing.count(text)


def test_a_run_of_a_depth_explains_itself_and_the_same_command_goes_on_with_it(gpt: Gpt) -> None:
    command = ("train", "--depth", "1", *SMALL)
    done = gpt(*command, "--steps", "1")
    assert done.code == 0, done.err
    assert "size       1 blocks: as asked" in done.out and "width      16: as asked; by the law 32" in done.out
    assert "rates      matrix" in done.out and ORIGIN in done.out
    written = json.loads(Path("runs/depth-1/config.json").read_text())
    assert written["recipe"]["optimizer"]["origin"] == ORIGIN and written["recipe"]["name"] == "depth-1"
    again = gpt(*command, "--steps", "2", "--seed", "5", "--resume")
    assert again.code == 2 and "--seed is 0, not 5" in again.err
    other = gpt("train", "--depth", "3", "--out", "runs/depth-1", "--resume")
    assert other.code == 2 and "--depth is 1, not 3" in other.err
