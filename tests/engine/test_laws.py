"""One dial: shapes, rates and batches follow from it; nano is what they begin with, and their table was measured."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from engine import laws
from engine.config import PRESETS

NANO = PRESETS["nano"]
RESULTS = Path(__file__).parents[2] / "bench/results/laws.json"


def test_nano_is_a_member_of_the_family_and_keeps_its_rates_and_its_batch() -> None:
    assert laws.shape(NANO.model.blocks) == NANO.model
    found = laws.optimizer(NANO.model, NANO.tokens_per_step, laws.TUNED_TOKENS)
    assert dataclasses.replace(found, origin=NANO.optimizer.origin) == NANO.optimizer
    assert laws.batch(laws.TUNED_TOKENS, NANO.model.context) == NANO.loop.batch


def test_a_deeper_model_is_larger_in_every_way_and_made_of_whole_heads() -> None:
    members = [laws.shape(depth) for depth in range(1, laws.MOST_BLOCKS + 1)]
    for smaller, larger in itertools.pairwise(members):
        assert larger.width >= smaller.width
        assert larger.parameters > smaller.parameters and larger.vocab_size >= smaller.vocab_size
    for model in members:
        assert model.head_dim in (32, 64) and model.head_dim * model.heads == model.width
        assert model.width <= 512 or model.width % 64 == 0
    assert 9e8 < laws.shape_of_parameters(1e9).parameters < 1.1e9
    assert laws.shape_of_parameters(NANO.model.parameters) == NANO.model
    assert (
        laws.shape_of_parameters(1).blocks == laws.LEAST_BLOCKS
        and laws.shape_of_parameters(1e15).blocks == laws.MOST_BLOCKS
    )


def test_a_rate_follows_each_quantity_by_its_own_power() -> None:
    wide = dataclasses.replace(NANO.model, width=4 * NANO.model.width)
    deep = dataclasses.replace(NANO.model, blocks=4 * NANO.model.blocks)
    step, tokens = NANO.tokens_per_step, laws.TUNED_TOKENS
    for name, powers in laws.RATES.items():
        own = getattr(NANO.optimizer, name)
        for found, power in (
            (laws.optimizer(wide, step, tokens), powers.width),
            (laws.optimizer(deep, step, tokens), powers.depth),
            (laws.optimizer(NANO.model, 4 * step, tokens), powers.batch),
            (laws.optimizer(NANO.model, step, 4 * tokens), powers.tokens),
        ):
            assert getattr(found, name) == pytest.approx(own * 4**power, rel=0.01)
            rates = {each: getattr(NANO.optimizer, each) for each in laws.RATES}
            assert dataclasses.replace(found, origin=NANO.optimizer.origin, **rates) == NANO.optimizer


def test_a_longer_run_has_larger_steps_between_bounds_and_a_multiple_of_the_processes() -> None:
    sizes = [256 * laws.batch(10.0**power, 256) for power in range(4, 15)]
    assert sizes == sorted(sizes) and sizes[0] == laws.LEAST_BATCH and sizes[-1] == laws.MOST_BATCH
    assert laws.batch(1e12, 512) == laws.MOST_BATCH // 512
    assert all(laws.batch(10.0**power, 256, 6) % 6 == 0 for power in range(4, 12))


@pytest.mark.skipif(not RESULTS.exists(), reason="the laws have not been measured")
def test_the_table_is_what_was_measured() -> None:
    measured = json.loads(RESULTS.read_text())["constants"]
    assert {name: dataclasses.asdict(powers) for name, powers in laws.RATES.items()} == measured["rates"]
    assert measured["batch_power"] == laws.BATCH_POWER
