"""Rollouts: what the sampler saw is what the trainer computes, and an answer that does not end is known."""

import pytest
import torch

from engine.model import GPT
from rlhf.prompts import Prompt
from rlhf.rollout import (
    Rollout,
    answer_kl,
    answer_log_probs,
    describe_answers,
    pack_answers,
    roll_out,
    rollout_log_probs,
    split_by_tokens,
    to_rows,
)

# Of lengths that differ: whatever the sampler pads, it must not show.
PROMPTS = [Prompt(tuple(range(1, 2 + 3 * n))) for n in range(6)]
ENDS = frozenset(range(20, 40))
IDS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
ANSWERS = [[11, 12], [13, 14, 15, 16], [17]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_s_log_probabilities_are_the_trainer_s(gpt: GPT, temperature: float) -> None:
    rollout = roll_out(gpt, PROMPTS, ENDS, temperature=temperature, seed=1)
    # What is told is at temperature 1, whatever the answers were drawn at.
    ours, _ = rollout_log_probs(gpt, rollout, 1.0, tokens_per_pass=30)
    torch.testing.assert_close(rollout.sampled, ours, atol=2e-5, rtol=0)
    assert len({len(answer) for answer in rollout.answers}) > 1
    drawn, entropy = rollout_log_probs(gpt, rollout, temperature, tokens_per_pass=10**6)
    batch = pack_answers([prompt.ids for prompt in PROMPTS], rollout.answers, gpt.config.context)
    torch.testing.assert_close(drawn, answer_log_probs(gpt, batch, temperature)[0].detach())
    assert (entropy >= 0).all() and torch.allclose(drawn, ours, atol=1e-4) == (temperature == 1)


def test_only_an_end_piece_ends_an_answer_and_it_is_part_of_it(gpt: GPT) -> None:
    rollout = roll_out(gpt, PROMPTS, ENDS, max_tokens=5, seed=2)
    for answer, ended in zip(rollout.answers, rollout.ended.tolist(), strict=True):
        assert ended == (answer[-1] in ENDS) and not ENDS & set(answer[:-1])
        assert ended or len(answer) == 5
    assert 0 < int(rollout.ended.sum()) < len(PROMPTS)
    assert rollout.mask.sum(dim=1).tolist() == [len(answer) for answer in rollout.answers]


def test_the_same_seed_draws_the_same_answers_and_equal_prompts_different_ones(gpt: GPT) -> None:
    first, again = (roll_out(gpt, [PROMPTS[1]] * 4, ENDS, seed=3).answers for _ in range(2))
    assert first == again and len({tuple(answer) for answer in first}) > 1


def test_rows_are_read_in_passes_that_hold_so_many_tokens_at_most(gpt: GPT) -> None:
    rollout = roll_out(gpt, PROMPTS, frozenset(), max_tokens=4)
    assert rollout.input_lengths == [4, 7, 10, 13, 16, 19]
    assert list(split_by_tokens(rollout.input_lengths, 21)) == [range(3), range(3, 4), range(4, 5), range(5, 6)]
    assert list(split_by_tokens(rollout.input_lengths, 1)) == [range(n, n + 1) for n in range(6)]


def test_answers_are_described_by_length_end_and_repetition(gpt: GPT) -> None:
    rollout = roll_out(gpt, PROMPTS[:2], frozenset(), max_tokens=3)
    rollout.answers[:] = [[5, 5, 5, 5], [6, 7]]
    assert describe_answers(rollout) == {"length": 3.0, "ended": 0.0, "distinct_2": 0.5}
    assert answer_kl(torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0]), rollout.mask) == 1.0


def test_packed_answers_have_the_log_probabilities_of_each_alone_at_the_temperature(gpt: GPT) -> None:
    batch = pack_answers(IDS, ANSWERS, gpt.config.context)
    for temperature in (1.0, 0.7):
        found, entropy = answer_log_probs(gpt, batch, temperature)
        expected, entropies = [], []
        for prompt, answer in zip(IDS, ANSWERS, strict=True):
            logits = gpt.logits(gpt(torch.tensor([prompt + answer])))[0, len(prompt) - 1 : -1]
            log_probs = (logits / temperature).log_softmax(dim=-1)
            expected.append(log_probs.gather(-1, torch.tensor(answer)[:, None])[:, 0])
            entropies.append(-(log_probs.exp() * log_probs).sum(dim=-1))
        torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(entropy, torch.cat(entropies), atol=2e-5, rtol=1e-5)


def test_gradients_flow_into_the_whole_model_from_rows(gpt: GPT) -> None:
    log_probs, _ = answer_log_probs(gpt, pack_answers(IDS, ANSWERS, gpt.config.context))
    mask = Rollout([Prompt((*ids,)) for ids in IDS], ANSWERS, torch.ones(3), torch.zeros(7)).mask
    rows = to_rows(log_probs, mask)
    assert rows.shape == (3, 4) and (rows[0, 2:] == 0).all()
    assert torch.equal(rows[0, :2], log_probs[:2]) and rows[2, 0] == log_probs[6]
    rows.sum(dim=1)[1].backward()
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
