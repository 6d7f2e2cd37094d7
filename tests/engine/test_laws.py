"""One dial: shapes, rates and batches follow from it; nano is what they begin with, and their table was measured."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest

from bench.findings import FORETOLD
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


@pytest.mark.parametrize(("name", "tokens"), [("tiny", 6 * laws.EPOCHS["tinystories"]), ("large", 7e9)])
def test_the_reference_recipes_take_the_rates_of_the_laws(name: str, tokens: float) -> None:
    preset = PRESETS[name]
    assert preset.optimizer == laws.optimizer(preset.model, preset.tokens_per_step, tokens)


def test_a_longer_run_has_larger_steps_between_bounds_and_a_multiple_of_the_processes() -> None:
    sizes = [256 * laws.batch(10.0**power, 256) for power in range(4, 15)]
    assert sizes == sorted(sizes) and sizes[0] == laws.LEAST_BATCH and sizes[-1] == laws.MOST_BATCH
    assert laws.batch(1e12, 512) == laws.MOST_BATCH // 512
    assert all(laws.batch(10.0**power, 256, 6) % 6 == 0 for power in range(4, 12))


def bits(depth: int, tokens: float, **rest: float) -> laws.Forecast:
    found = laws.forecast(laws.shape(depth), tokens, "tinystories", **rest)
    assert found is not None and found.low < found.middle < found.high
    return found


def test_more_weights_and_more_tokens_forecast_less_and_what_is_beyond_the_measured_less_surely() -> None:
    law = laws.LOSSES["tinystories"]
    most = 1e6 * law.tokens[1]
    assert bits(4, most).middle < bits(4, most / 2).middle and bits(6, most).middle < bits(4, most).middle
    spreads = [bits(4, most * 10**n).high / bits(4, most * 10**n).middle for n in (-0.5, 0, 1, 2)]
    assert spreads[0] == spreads[1] == pytest.approx(math.exp(1.645 * law.spread))
    assert spreads[1] < spreads[2] < spreads[3]
    assert bits(40, most).high / bits(40, most).middle > spreads[0]
    assert bits(4, most, rate=1.0).middle == pytest.approx(bits(4, most).middle * (1 + laws.UNDECAYED))
    assert laws.forecast(laws.shape(4), 0.9e6 * law.tokens[0], "tinystories") is None
    assert laws.forecast(laws.shape(4), 1e9, "my.txt") is None
    assert str(laws.Forecast(0.9, 1.0, 1.1)) == "1.000 bits per byte (0.900 to 1.100)"


def test_tokens_that_come_again_are_worth_less() -> None:
    assert [laws.as_fresh(tokens, 2e6, 15.39) for tokens in (1e6, 2e6)] == [1e6, 2e6]
    # Up to four epochs are nearly as good as fresh tokens; forty are worth little more than sixteen.
    assert laws.as_fresh(4e6, 1e6, 15.39) == pytest.approx(3.73e6, rel=0.01)
    assert laws.as_fresh(1e9, 1e6, 15.39) == pytest.approx(16.39e6)


def test_text_that_comes_again_counts_less_and_less() -> None:
    for depth, epoch, repeats in ((4, 1e6, 1.1 / 1.278), (2, 1e8, laws.REPEATS)):
        once, twice, often, ever = (bits(depth, times * epoch, epoch=epoch).middle for times in (1, 2, 100, 10_000))
        assert once == bits(depth, epoch).middle > twice > often
        assert bits(depth, 2 * epoch).middle < twice
        at_most = bits(depth, epoch * (1 + repeats)).middle
        assert often == pytest.approx(ever, rel=0.001) and ever == pytest.approx(at_most, rel=0.001)
    # A small model learns more from what it has read before.
    gains = [bits(depth, 2e6, epoch=1e6).middle / bits(depth, 2e6).middle for depth in (2, 4, 8)]
    assert gains == sorted(gains)


def test_weights_and_tokens_gain_alike_at_the_length_that_suits_a_size() -> None:
    for text, law in laws.LOSSES.items():
        model = laws.shape(6)
        n, d = model.matmul_parameters / 1e6, laws.optimal_tokens(model, text) / 1e6
        of_weights = law.weights_power * law.of_weights / n**law.weights_power
        assert of_weights == pytest.approx(law.tokens_power * law.of_tokens / d**law.tokens_power, rel=1e-3)
    assert laws.optimal_tokens(laws.shape(6), "my.txt") == laws.optimal_tokens(laws.shape(6), "tinystories")
    # Beyond the sizes that were measured, Hoffmann et al.
    for depth in (12, 24):
        model = laws.shape(depth)
        assert 19 < laws.optimal_tokens(model, "tinystories") / model.matmul_parameters < 21


def test_the_references_loss_is_said_in_bits_per_byte() -> None:
    assert laws.REFERENCES["tiny"].bits_per_byte == pytest.approx(1.15 / math.log(2) / 4.2)
    assert laws.REFERENCES.keys() <= PRESETS.keys()


def test_the_table_is_what_was_measured() -> None:
    found = json.loads(RESULTS.read_text())["size"]
    own = laws.LOSSES["tinystories"]
    assert own.size == found["size"]
    assert own.weights == pytest.approx(found["weights"], rel=0.01)
    assert own.tokens == pytest.approx(found["tokens"], rel=0.02)
    law = found["floors"][str(own.floor)]
    for name in ("of_weights", "weights_power", "of_tokens", "tokens_power", "power"):
        assert getattr(own, name) == pytest.approx(law[name], rel=0.01), name
    for text, each in found["texts"].items():
        same = dataclasses.replace(own, factor=laws.LOSSES[text].factor, spread=laws.LOSSES[text].spread)
        assert laws.LOSSES[text] == same and same.factor == pytest.approx(each["factor"], rel=0.01)
        assert same.spread > each["scatter"]
    assert own.spread > max(law["scatter"], law["error_of_the_largest"])
    # A forecast is no surer than draws of runs, of the meaning of a size, and of the floor are of one another.
    for preset, far in found["far"].items():
        model = PRESETS[preset].model
        beyond = math.log10(model.matmul_parameters / 1e6 / own.weights[1])
        tokens = FORETOLD[preset]
        beyond += math.log10(tokens / own.tokens[1])
        assert own.spread + laws.SPREAD_PER_DECADE * beyond >= far["deviation"]
        middle = dataclasses.replace(own, factor=1.0)(model.matmul_parameters / 1e6, tokens)
        assert middle == pytest.approx(far["bits_per_byte"], rel=0.05)
    for each in found["repeats"]:
        law_of = laws.REPEATS_BY_TOKENS_PER_WEIGHT * each["tokens_per_weight"]
        assert law_of == pytest.approx(each["repeats"], rel=0.25)
