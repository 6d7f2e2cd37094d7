"""The native sampler against engine/sampling.py, whose meaning it has, and against float64."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.sampling import Past, Sampling, distribution, penalise
from kernels.cpu.jit import exp
from kernels.cpu.sampling import DRAWS, ROW, choose_next

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1e-45},
    {"top_k": 1},
    {"top_k": 7, "temperature": 1.3},
    {"top_k": 400},
    {"top_p": 1e-9},
    {"top_p": 0.5},
    {"top_p": 0.95, "temperature": 0.8},
    {"min_p": 0.05},
    {"min_p": 0.9},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6, "temperature": 0.0},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"presence_penalty": 2.0, "temperature": 0.0},
    {"frequency_penalty": -0.7},
    {"logit_bias": ((0, 3.0),)},
    {
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": -1,
        "logit_bias": ((0, 5),),
    },
)


def chosen(
    logits: Tensor, samplings: list[Sampling], draws: Tensor, past: Past | None = None
) -> tuple[list[int], Tensor]:
    """Return the tokens and their log-probabilities. Every row takes a draw of its own."""
    count, tokens = logits.shape
    past = past or Past(torch.zeros(logits.shape, dtype=torch.uint8), torch.zeros(logits.shape))
    rows = np.zeros(count, ROW)
    for row, sampling, draw in zip(rows, samplings, draws.tolist(), strict=True):
        row["temperature"] = sampling.temperature and max(sampling.temperature, 1e-10)
        row["top_k"], row["top_p"] = min(sampling.top_k or tokens, tokens), sampling.top_p
        row["min_p"], row["penalty"] = sampling.min_p, sampling.repetition_penalty
        row["changes"], row["presence"] = sampling.changes_logits, sampling.presence_penalty
        row["frequency"] = sampling.frequency_penalty
        row["logprob"], row["drawn"], row["draws"][3] = 1, 3, draw
    scratch, before = np.full((4, tokens), np.nan, np.float32), logits.clone()
    pasts = (past.seen.numpy(), past.added.numpy())
    found = [choose_next(*each, scratch) for each in zip(rows, logits.numpy(), *pasts, strict=True)]
    assert logits.equal(before) or logits.isnan().any()
    return [token for token, _ in found], torch.tensor([logprob for _, logprob in found])


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 4096, 5000])
@pytest.mark.parametrize("spread", [0.05, 3.0, 20.0])
def test_it_chooses_as_the_definition_does(size: int, spread: float) -> None:
    torch.manual_seed(size)
    samplings = [Sampling(**each) for each in SETTINGS] * 3
    logits = torch.randn(len(samplings), size) * spread
    seen = (torch.rand(logits.shape) * 2.2).to(torch.uint8)
    past, draws = Past(seen, torch.randn(logits.shape) * (seen != 1)), torch.rand(len(samplings))
    was = Past(*(each.clone() for each in past))
    tokens, logprobs = chosen(logits, samplings, draws, past)
    exact = logits.double().log_softmax(-1)
    for row, (sampling, token) in enumerate(zip(samplings, tokens, strict=True)):
        part, own = logits[row : row + 1], Past(*(each[row : row + 1] for each in was))
        assert logprobs[row].item() == pytest.approx(exact[row, token].item(), abs=2e-6 * spread + 1e-6)
        if sampling.changes_logits:
            after = Past(*(each[0].clone() for each in own))
            after.note(torch.tensor([token]), sampling)
            assert after.seen.equal(past.seen[row]) and after.added.equal(past.added[row])
            part = penalise(part, sampling, own)
        if sampling.temperature == 0:
            assert token == int(part.argmax())
            continue
        share = distribution(part, sampling)[0].double()
        upper = share.cumsum(0)
        assert share[token] > 0
        # The sums are rounded in another order: on the bound between two tokens either may be chosen.
        assert upper[token] - share[token] - 1e-6 <= draws[row] <= upper[token] + 1e-6, (sampling, token)


def test_of_equal_scores_top_k_keeps_all_and_top_p_the_first() -> None:
    logits = torch.zeros(1, 600).index_fill_(1, torch.tensor([5, 100, 599]), 2.0)
    draws = torch.linspace(0, 1 - 2**-24, 200)

    def possible(**cuts: Any) -> set[int]:
        return set(chosen(logits.expand(200, -1).contiguous(), [Sampling(**cuts)] * 200, draws)[0])

    assert possible(top_k=2) == possible(top_k=3) == {5, 100, 599}
    assert possible(top_k=4) == possible() and len(possible()) > 100
    share = math.exp(2) / (3 * math.exp(2) + 597)
    assert possible(top_p=1.5 * share) == {5, 100}
    assert possible(top_p=3.2 * share) == {5, 100, 599, 0, 1}


def test_without_a_distribution_it_does_what_the_definition_does() -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[1, nan, 3, nan], [1, -nan, 3, 2], [1, inf, 3, inf], [-inf] * 4, [-inf, 2, -inf, 3]])
    draws = torch.full((5,), 0.99)
    tokens, logprobs = chosen(logits, [Sampling(0.0)] * 5, draws)
    assert tokens == logits.argmax(-1).tolist() and logprobs.isnan().tolist() == [True] * 4 + [False]
    for sampling in (Sampling(), Sampling(top_k=2), Sampling(0.5, top_p=0.9)):
        tokens, logprobs = chosen(logits, [sampling] * 5, draws)
        assert tokens == [0, 0, 0, 0, 3] and logprobs.isnan().tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_the_lowest_and_the_highest_draw_fall_on_tokens_that_have_probability(draw: float) -> None:
    logits = torch.rand(300, 700)
    logits[:, :300] = logits[:, -300:] = -1e4
    for sampling in (Sampling(), Sampling(0.3)):
        tokens, _ = chosen(logits, [sampling] * 300, torch.full((300,), draw))
        assert set(tokens) == ({300} if draw == 0 else {399})


def test_a_row_takes_its_draws_in_order_and_none_where_it_is_cold() -> None:
    rows = np.zeros(2, ROW)
    rows["top_k"], rows["top_p"], rows["penalty"], rows["temperature"] = 1000, 1, 1, [1, 0]
    rows["draws"] = np.linspace(0, 1, DRAWS, endpoint=False)
    scores, scratch = np.zeros(1000, np.float32), np.zeros((4, 1000), np.float32)
    past = np.zeros(0, np.uint8), np.zeros(0, np.float32)
    for step in range(DRAWS):
        (warm, logprob), (cold, _) = (choose_next(row, scores, *past, scratch) for row in rows)
        assert abs(warm - 1000 * step / DRAWS) <= 1 and cold == 0 and math.isnan(logprob)
    assert rows["drawn"].tolist() == [DRAWS, 0]


def test_its_exponential_is_within_two_units_of_the_last_place() -> None:
    generator = random.Random(0)
    for x in [0.0, -0.0, -87.0, -1e-30, *(generator.uniform(-87, 0) for _ in range(2000))]:
        value = np.float32(x)
        exact = math.exp(float(value))
        assert abs(float(exp(value)) - exact) <= 2 * np.spacing(np.float32(exact))
    assert exp(np.float32(-87.1)) == exp(np.float32(-math.inf)) == 0 and exp(np.float32(0)) == 1
