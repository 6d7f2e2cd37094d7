"""Each cut of the distribution against its definition, and draws that follow it."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import InputError
from engine.sampling import Past, Sampling, begin_past, choose, distribution, make_generator, penalise

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0], [0.0, -4.0, 3.0, 2.9, -0.5, 1.0]])


def make_generators(seed: int | None, count: int) -> list[torch.Generator]:
    return [make_generator(Sampling(seed=seed).of_row(row).seed) for row in range(count)]


def probabilities(row: Tensor, temperature: float = 1.0) -> list[float]:
    weights = [math.exp(logit / temperature) for logit in row.tolist()]
    return [weight / sum(weights) for weight in weights]


def keep(values: list[float], kept: set[int]) -> list[float]:
    total = sum(values[index] for index in kept)
    return [value / total if index in kept else 0.0 for index, value in enumerate(values)]


def ranked(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda index: -values[index])


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("size", [1, 3, 6, 100])
def test_top_k_keeps_the_k_likeliest(row: int, temperature: float, size: int) -> None:
    plain = probabilities(LOGITS[row], temperature)
    found = distribution(LOGITS, Sampling(temperature, top_k=size))[row]
    torch.testing.assert_close(found, torch.tensor(keep(plain, set(ranked(plain)[:size]))))


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.8, 0.95, 1.0])
def test_top_p_keeps_the_smallest_set_that_holds_the_share(row: int, share: float) -> None:
    plain = probabilities(LOGITS[row])
    kept: set[int] = set()
    for index in ranked(plain):
        kept.add(index)
        if sum(plain[each] for each in kept) >= share:
            break
    found = distribution(LOGITS, Sampling(top_p=share))[row]
    torch.testing.assert_close(found, torch.tensor(keep(plain, kept)))
    assert found.count_nonzero() >= 1


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_min_p_drops_what_is_less_likely_than_a_share_of_the_likeliest(row: int, share: float) -> None:
    plain = probabilities(LOGITS[row])
    kept = {index for index, value in enumerate(plain) if value >= share * max(plain)}
    torch.testing.assert_close(distribution(LOGITS, Sampling(min_p=share))[row], torch.tensor(keep(plain, kept)))


@pytest.mark.parametrize("penalty", [0.5, 1.5])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_repetition_penalty_moves_seen_tokens_alone_and_always_away(penalty: float, temperature: float) -> None:
    past = Past(torch.tensor([[1, 0, 0, 0, 2, 0], [0] * 6], dtype=torch.uint8), torch.zeros(2, 6))
    expected = LOGITS.clone()
    expected[0, 0], expected[0, 4] = LOGITS[0, 0] / penalty, LOGITS[0, 4] * penalty
    sampling = Sampling(temperature, repetition_penalty=penalty)
    if temperature == 0:
        assert choose(LOGITS, sampling, make_generators(0, 2), past).tolist() == expected.argmax(-1).tolist()
    else:
        found = distribution(penalise(LOGITS, sampling, past), sampling)
        torch.testing.assert_close(found, (expected / temperature).softmax(-1))


def test_presence_and_frequency_count_what_was_generated_and_a_bias_is_added() -> None:
    # mu[j] - c[j] * frequency - (c[j] > 0) * presence, as OpenAI's documentation has it, c over generated tokens.
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=-0.25, logit_bias=((1, 3.0), (5, -100.0)))
    past = begin_past(sampling, [4, 4, 1], 6)
    for token in (2, 0, 2, 1, 2):
        past.note(torch.tensor([token]), sampling)
    expected = LOGITS[0] + torch.tensor([-0.25, 3 - 0.25, -0.5 + 0.75, 0, 0, -100])
    torch.testing.assert_close(penalise(LOGITS[:1], sampling, Past(*(each[None] for each in past)))[0], expected)
    again = begin_past(sampling, [4, 4, 1, 2, 0, 2, 1, 2], 6, generated=5)
    assert again.seen.equal(past.seen) and again.added.equal(past.added) and again.seen.tolist() == [2, 2, 2, 0, 1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_100_demands_and_of_minus_100_forbids(temperature: float) -> None:
    for bias, expected in ((((5, 100.0),), {5}), (((0, -100.0), (1, -100.0), (2, -100.0)), {3, 4, 5})):
        sampling = Sampling(temperature, logit_bias=bias)
        past = Past(*(each.expand(200, -1) for each in begin_past(sampling, [0], 6)))
        chosen = choose(LOGITS[:1].expand(200, -1), sampling, make_generators(0, 1) * 200, past)
        assert set(chosen.tolist()) <= expected


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12),
    temperature=st.floats(1e-45, 100),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.floats(1e-9, 1),
    min_p=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 1000),
)
def test_any_options_leave_a_distribution_and_choose_from_it(
    logits: list[float], seed: int, temperature: float, **cuts: Any
) -> None:
    sampling = Sampling(temperature, **cuts)
    found = distribution(torch.tensor([logits]), sampling)
    assert found.sum().item() == pytest.approx(1, abs=1e-5) and (found >= 0).all()
    assert found[0, int(torch.tensor(logits).argmax())] > 0
    assert found[0, choose(torch.tensor([logits]), sampling, make_generators(seed, 1))] > 0


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-45, 1e-30, 1e-3])
def test_no_temperature_and_hardly_any_take_the_likeliest(temperature: float) -> None:
    assert choose(LOGITS, Sampling(temperature), make_generators(0, 2)).tolist() == [0, 2]


def test_temperature_zero_draws_nothing() -> None:
    (generator,) = make_generators(5, 1)
    before = generator.get_state()
    choose(LOGITS[:1], Sampling(0.0), [generator])
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, top_k=4), Sampling(0.8, top_p=0.9)], ids=str)
@pytest.mark.parametrize("fresh", [False, True], ids=["one generator", "a generator per draw"])
def test_draws_follow_the_distribution(sampling: Sampling, fresh: bool) -> None:
    draws = 4000
    generators = make_generators(1, draws) if fresh else make_generators(1, 1) * draws
    chosen = choose(LOGITS[:1].expand(draws, -1), sampling, generators)
    expected = distribution(LOGITS[:1], sampling)[0] * draws
    counts = torch.bincount(chosen, minlength=expected.numel())
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = ((counts - expected).square() / expected)[possible].sum().item()
    degrees = int(possible.sum()) - 1
    # Five standard deviations above its mean.
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_the_lowest_and_the_highest_draw_fall_on_tokens_that_have_probability(
    draw: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, draw))
    logits = torch.randn(500, 40)
    logits[:, :3] = logits[:, -3:] = -1e4
    chosen = choose(logits, Sampling(), make_generators(0, 500))
    assert set(chosen.tolist()) == ({3} if draw == 0 else {36})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("logit_bias", ((3, 0.0), (4, 100.5))),
        ("logit_bias", ((3, math.nan),)),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_an_option_out_of_range_is_named_with_its_range(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} .*is .* must be "):
        Sampling(**{name: value})


def test_a_seed_fixes_the_draws_and_no_seed_does_not() -> None:
    def draws(seed: int | None) -> list[float]:
        return [torch.rand(1, generator=generator).item() for generator in make_generators(seed, 3)]

    assert draws(4) == draws(4) and len(set(draws(4))) == 3
    assert draws(4) != draws(5)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("spread", [1.0, 8.0], ids=["many tokens hold the share", "few do"])
def test_top_p_does_not_depend_on_how_the_likeliest_are_found(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    logits = torch.randn(3, 2000) * spread
    found = distribution(logits, Sampling(top_p=0.9))
    monkeypatch.setattr("engine.sampling.FEW", 2000)
    assert torch.equal(found, distribution(logits, Sampling(top_p=0.9)))
