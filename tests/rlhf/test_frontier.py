"""Measuring a policy: scores with their spread, KL to the reference, and the picture of both."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.model import GPT
from rlhf.frontier import BEST_OF_N, describe_scores, measure_policy, plot_frontier
from rlhf.rewards import Prompt

PROMPTS = [Prompt((1, 2)), Prompt((3,)), Prompt((4, 5, 6))]
ENDS = frozenset(range(20, 60))


def length(prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([float(len(answer)) for answer in answers])


def test_the_error_is_of_the_mean_over_prompts() -> None:
    found = describe_scores("gold", torch.tensor([[1.0, 3.0], [2.0, 6.0], [0.0, 0.0]]))
    assert found["gold"] == 2 and found["gold_std"] == pytest.approx(((1 + 1 + 0 + 16 + 4 + 4) / 6) ** 0.5)
    assert found["gold_error"] == pytest.approx((((0 + 4 + 4) / 2) ** 0.5) / 3**0.5)


def test_a_model_is_at_no_distance_from_itself_and_at_some_from_another(gpt: GPT) -> None:
    torch.manual_seed(5)
    other = GPT(gpt.config)
    measured = measure_policy(gpt, gpt, PROMPTS, {"reward": length}, ENDS, answers=8, max_tokens=6)
    assert measured["kl"] == measured["kl_k3"] == measured["kl_error"] == 0
    assert measured["reward"] == pytest.approx(measured["length"]) and measured["reward_std"] > 0
    far = measure_policy(other, gpt, PROMPTS, {"reward": length}, ENDS, answers=8, max_tokens=6, tokens_per_pass=20)
    again = measure_policy(other, gpt, PROMPTS, {"reward": length}, ENDS, answers=8, max_tokens=6)
    assert far == pytest.approx(again, abs=1e-5)
    assert far["kl"] > 3 * far["kl_error"] > 0 and far["kl"] == pytest.approx(far["kl_k3"], abs=3 * far["kl_error"])


def test_the_picture_has_a_panel_for_each_score(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scores = {"reward": 0.5, "reward_error": 0.1}
    line = [{"n": n, "kl": 0.5 * n, **scores} for n in (1, 2)]
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert plot_frontier({BEST_OF_N: line, "ppo": [{"kl": 1.0, **scores}]}, one)
    gold = {"gold": 0.7, "gold_error": 0.0}
    assert plot_frontier({BEST_OF_N: [{**point, **gold} for point in line]}, two)
    far = {BEST_OF_N: line, "ppo": [{"kl": 1.0, **scores}], "free": [{"kl": 90.0, **scores}]}
    assert plot_frontier(far, tmp_path / "far.png")
    from matplotlib import pyplot

    assert pyplot.imread(two).shape[1] > 1.5 * pyplot.imread(one).shape[1]
