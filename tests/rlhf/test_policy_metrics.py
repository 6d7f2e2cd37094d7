"""Measuring a policy: its scores and its KL, the best of n beside it, and what looks like reward hacking."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.chat_template import answer_ends
from engine.config import preset
from engine.model import GPT
from engine.tokenizer import Tokenizer
from rlhf.policy_metrics import (
    BEST_OF_N,
    PolicyMonitor,
    best_of_n,
    best_of_n_kl,
    describe_scores,
    measure_policy,
    plot_reward_vs_kl,
    suspicions,
)
from rlhf.prompts import Prompt
from rlhf.rollout import Rollout, roll_out

PROMPTS = [Prompt((1, 2)), Prompt((3,)), Prompt((4, 5, 6))]
ENDS = frozenset(range(20, 60))


BEGIN = {"reward": 0.0, "gold": 0.7, "gold_error": 0.05, "length": 100.0, "ended": 0.9, "distinct_2": 0.3}


def length(prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([float(len(answer)) for answer in answers])


def answers_of(model: GPT) -> Rollout:
    return roll_out(model, PROMPTS, ENDS, each=8, max_tokens=6)


def test_the_error_is_of_the_mean_over_prompts() -> None:
    found = describe_scores("gold", torch.tensor([[1.0, 3.0], [2.0, 6.0], [0.0, 0.0]]))
    assert found["gold"] == 2 and found["gold_std"] == pytest.approx(((1 + 1 + 0 + 16 + 4 + 4) / 6) ** 0.5)
    assert found["gold_error"] == pytest.approx((((0 + 4 + 4) / 2) ** 0.5) / 3**0.5)


def test_a_model_is_at_no_distance_from_itself_and_at_some_from_another(gpt: GPT) -> None:
    torch.manual_seed(5)
    other = GPT(gpt.config)
    measured = measure_policy(gpt, gpt, answers_of(gpt), {"reward": length}, answers=8)
    assert measured["kl"] == measured["kl_k3"] == measured["kl_error"] == 0
    assert measured["reward"] == pytest.approx(measured["length"]) and measured["reward_std"] > 0
    far = measure_policy(other, gpt, answers_of(other), {"reward": length}, answers=8, tokens_per_pass=20)
    again = measure_policy(other, gpt, answers_of(other), {"reward": length}, answers=8)
    assert far == pytest.approx(again, abs=1e-5)
    assert far["kl"] > 3 * far["kl_error"] > 0 and far["kl"] == pytest.approx(far["kl_k3"], abs=3 * far["kl_error"])


def test_the_picture_has_a_panel_for_each_score(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scores = {"reward": 0.5, "reward_error": 0.1}
    line = [{"n": n, "kl": 0.5 * n, **scores} for n in (1, 2)]
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert plot_reward_vs_kl({BEST_OF_N: line, "ppo": [{"kl": 1.0, **scores}]}, one)
    gold = {"gold": 0.7, "gold_error": 0.0}
    assert plot_reward_vs_kl({BEST_OF_N: [{**point, **gold} for point in line]}, two)
    far = {BEST_OF_N: line, "ppo": [{"kl": 1.0, **scores}], "free": [{"kl": 90.0, **scores}]}
    assert plot_reward_vs_kl(far, tmp_path / "far.png")
    from matplotlib import pyplot

    assert pyplot.imread(two).shape[1] > 1.5 * pyplot.imread(one).shape[1]


def test_the_best_of_more_is_better_and_its_kl_is_bounded(gpt: GPT, tokenizer: Tokenizer) -> None:
    def high(prompts: object, answers: list[list[int]]) -> torch.Tensor:
        return torch.tensor([float(answer[0]) for answer in answers])

    def low(prompts: object, answers: list[list[int]]) -> torch.Tensor:
        return -high(prompts, answers)

    rollout = roll_out(gpt, [Prompt((1, 2)), Prompt((3,))], answer_ends(tokenizer), each=8)
    answers = rollout.answers
    assert [prompt.ids for prompt in rollout.prompts[::8]] == [(1, 2), (3,)] and len(answers) == 16
    found = best_of_n(rollout, 8, "high", {"high": high, "low": low})  # type: ignore[dict-item]
    assert [point["n"] for point in found] == [1, 2, 4, 8]
    rewards = [point["high"] for point in found]
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1]
    assert rewards[0] == pytest.approx(float(high(None, answers).mean()))
    assert rewards[-1] == pytest.approx(float(high(None, answers).view(2, 8).amax(dim=1).mean()))
    assert all(point["low"] == -point["high"] for point in found)
    assert found[0]["kl"] == 0 and best_of_n_kl(64) == pytest.approx(3.17, abs=0.01)


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"reward": 1.0, "gold": 0.9, "length": 150.0, "distinct_2": 0.2}, set()),
        ({"reward": 1.0, "gold": 0.6}, {"gold"}),
        ({"reward": 1.0, "gold": 0.68}, set()),
        ({"reward": -1.0, "gold": 0.6}, set()),
        ({"distinct_2": 0.1}, {"distinct_2"}),
        ({"ended": 0.4, "length": 201.0}, {"ended", "length"}),
        ({"length": 49.0}, {"length"}),
    ],
)
def test_what_leaves_its_range_is_suspect(change: dict[str, float], kinds: set[str]) -> None:
    assert suspicions(BEGIN, {**BEGIN, **change}).keys() == kinds


def test_without_a_reward_or_gold_the_rest_is_monitored() -> None:
    few = {name: BEGIN[name] for name in ("length", "ended", "distinct_2")}
    assert suspicions(few, {**few, "ended": 0.1}).keys() == {"ended"}


def test_each_kind_is_said_once_and_kept_in_the_metrics(gpt: GPT, tokenizer: Tokenizer) -> None:
    said: list[str] = []
    states = iter([BEGIN, {**BEGIN, "length": 10.0}, {**BEGIN, "length": 9.0, "ended": 0.0}, BEGIN])

    class Told(PolicyMonitor):
        def measure(self, policy: GPT) -> dict[str, float]:
            return dict(next(states))

    monitor = Told(preset("nano"), gpt, PROMPTS, {}, tokenizer, said.append)
    found = [monitor(gpt) for _ in range(3)]
    assert len(said) == 2 and "from 100 to 10 tokens" in said[0] and "ended answers fell" in said[1]
    assert [each["suspect_length"] for each in found] == [1, 1, 0] and found[1]["suspect_ended"] == 1
    assert found[0]["suspect_gold"] == 0 and found[0]["length"] == 10
