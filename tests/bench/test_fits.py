"""The fits find the constants of points that were made with them, and say how sure they are."""

import dataclasses

import numpy as np
import pytest

from bench import fits
from engine.laws import Law

RANDOM = np.random.default_rng(0)
# About as many runs as a sweep over sizes has.
SIZES, TOKENS = (each.ravel() for each in np.meshgrid(np.geomspace(0.04, 3, 8), np.geomspace(0.1, 3, 6)))
LAW = Law(0.0, of_weights=0.46, weights_power=0.38, of_tokens=1.5, tokens_power=0.52, power=0.34)


def test_a_valley_is_lowest_where_it_was_put_and_knows_how_well() -> None:
    rates = 2.0 ** np.arange(-2, 2.5, 0.5)
    exact = fits.valley(rates, 1.2 + 0.01 * np.log2(rates / 1.3) ** 2)
    assert exact.inside and exact.rate == pytest.approx(1.3) and exact.loss == pytest.approx(1.2)
    # Two seeds, and noise as it is said: four in five of the minima are within 1.28 errors of the truth.
    twice, hits = np.tile(rates, 2), 0
    for _ in range(200):
        losses = (1.2 + 0.02 * np.log2(twice / 1.3) ** 2) * (1 + 0.002 * RANDOM.standard_normal(len(twice)))
        found = fits.valley(twice, losses, noise=0.002)
        hits += abs(np.log(found.rate / 1.3)) < 1.28 * np.log(found.error or 1)
    assert 140 <= hits <= 190


def test_a_valley_whose_lowest_point_is_the_last_has_no_minimum_inside() -> None:
    found = fits.valley([0.5, 1, 2], [1.3, 1.2, 1.1])
    assert not found.inside and found.rate == 2 and found.error is None
    # Rates far from one another are better than none.
    assert fits.valley([1, 4, 16], [1.2, 1.1, 1.2]).rate == pytest.approx(4)


def test_powers_are_found_with_their_errors() -> None:
    batches, tokens = (each.ravel() for each in np.meshgrid(2.0 ** np.arange(10, 16), [6e5, 2.4e6]))
    rates = 3e-4 * batches**0.5 * tokens**-0.2
    found, errors = fits.powers(rates, batches, tokens)
    assert found == pytest.approx([np.log(3e-4), 0.5, -0.2]) and errors.max() < 1e-6
    noisy = rates * np.exp(0.1 * RANDOM.standard_normal(len(rates)))
    for known in (None, np.full(len(rates), np.exp(0.1))):
        found, errors = fits.powers(noisy, batches, tokens, errors=known)
        assert (np.abs(found[1:] - (0.5, -0.2)) < 3 * errors[1:]).all() and errors[1] < 0.05


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_a_forecast_is_the_law_that_made_the_runs(floor: float) -> None:
    law = dataclasses.replace(LAW, floor=floor)
    found = fits.forecast(SIZES, TOKENS, fits.along(law, SIZES, TOKENS), floor)
    for name in ("weights_power", "tokens_power", "power"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), abs=0.02)
    assert found.floor == floor and found(20, 300) == pytest.approx(law(20, 300), rel=0.005)


def test_sizes_differ_little_with_few_tokens_and_much_with_many() -> None:
    few, many = (LAW(0.1, tokens) / LAW(3, tokens) for tokens in (0.1, 100))
    assert 1 < few < 1.1 and many > 1.4


def test_a_run_that_went_wrong_moves_a_forecast_little() -> None:
    losses = fits.along(LAW, SIZES, TOKENS) * (1 + 0.003 * RANDOM.standard_normal(len(SIZES)))
    losses[7] *= 1.2
    small, error = fits.held_out(SIZES, TOKENS, losses, np.argsort(SIZES * TOKENS)[-7:])
    whole = fits.forecast(SIZES, TOKENS, losses)
    assert error < 0.01 and small != whole and whole(10, 10) == pytest.approx(LAW(10, 10), rel=0.02)
