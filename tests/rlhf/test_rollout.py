"""Rollouts: what the sampler saw is what the trainer computes, and an answer that does not end is known."""

import pytest
import torch

from engine.model import GPT
from rlhf.log_probs import answer_log_probs, pack_answers
from rlhf.rewards import Prompt
from rlhf.rollout import answer_kl, describe_answers, passes, roll_out, rollout_log_probs

# Of lengths that differ: whatever the sampler pads, it must not show.
PROMPTS = [Prompt(tuple(range(1, 2 + 3 * n))) for n in range(6)]
ENDS = frozenset(range(20, 40))


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
    sizes = [len(prompt.ids) + 3 for prompt in PROMPTS]
    assert sizes == [4, 7, 10, 13, 16, 19]
    assert list(passes(rollout, 21)) == [range(3), range(3, 4), range(4, 5), range(5, 6)]
    assert list(passes(rollout, 1)) == [range(n, n + 1) for n in range(6)]


def test_answers_are_described_by_length_end_and_repetition(gpt: GPT) -> None:
    rollout = roll_out(gpt, PROMPTS[:2], frozenset(), max_tokens=3)
    rollout.answers[:] = [[5, 5, 5, 5], [6, 7]]
    assert describe_answers(rollout) == {"length": 3.0, "ended": 0.0, "distinct_2": 0.5}
    assert answer_kl(torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0]), rollout.mask) == 1.0
