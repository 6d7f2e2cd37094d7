"""Best of n: the answer that the reward likes best of n. No training; the curve that every method is compared with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model import GPT
from rlhf.frontier import describe_scores
from rlhf.rewards import Prompt, Reward
from rlhf.rollout import roll_out


@dataclass(frozen=True)
class BestOfN:
    n: int
    kl: float  # to the model that drew them, in nats per answer, at most
    rewards: dict[str, float]  # by the name of the reward, as of rlhf.frontier.describe_scores


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: an upper bound of the KL to the model that draws n answers (Beirami et al., 2401.01879)."""
    return math.log(n) - (n - 1) / n


def draw_answers(
    model: GPT, prompts: Sequence[Prompt], most: int, ends: frozenset[int], *, seed: int, temperature: float = 1.0
) -> tuple[list[Prompt], list[list[int]]]:
    """`most` answers to each prompt, beside the prompts repeated."""
    repeated = [prompt for prompt in prompts for _ in range(most)]
    return repeated, roll_out(model, repeated, ends, temperature=temperature, seed=seed).answers


def best_of_n(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], most: int, by: str, rewards: dict[str, Reward]
) -> list[BestOfN]:
    """What the best by the reward called `by` are worth by every reward, for n = 1, 2, 4 ... up to `most`.

    prompts and answers as of draw_answers; for a small n the answers are many independent draws of n, and all count.
    """
    scores = {name: reward(prompts, answers).view(-1, most) for name, reward in rewards.items()}
    sizes = [2**power for power in range(most.bit_length())]
    return [BestOfN(n, best_of_n_kl(n), _worth(scores, by, n)) for n in sizes if n <= most]


def _worth(scores: dict[str, Tensor], by: str, n: int) -> dict[str, float]:
    def draws(name: str) -> Tensor:
        return scores[name][:, : scores[name].shape[1] // n * n].unflatten(1, (-1, n))

    best = draws(by).argmax(dim=2, keepdim=True)
    found: dict[str, float] = {}
    for name in scores:
        found |= describe_scores(name, torch.gather(draws(name), 2, best)[..., 0])
    return found
