"""From scores to advantages: KL penalties, rewards per token, generalised advantage estimation, groups of answers.

Answers of different lengths stand in rows [B, T] beside a mask, True at the tokens that the policy chose. What stands
where the mask is False, NaN even, changes nothing, and every result is 0 there. Log-probabilities are in nats.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """Of each token [B, T]: how much better it was than expected, and what the critic should have expected."""

    advantages: Tensor
    returns: Tensor


class GroupAdvantages(NamedTuple):
    advantages: Tensor  # [prompts, answers]
    undecided: int  # groups whose answers all score the same: nothing can be learnt from them


def k1(log_probs: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) of a token that the policy drew: unbiased, of either sign. Any shape.

    Schulman 2020, http://joschu.net/blog/kl-approx.html; both arguments are log-probabilities of the same tokens.
    """
    require_same_shape(log_probs=log_probs, reference=reference)
    return log_probs - reference


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """The same, unbiased too, never negative and of less variance: exp(-k1) - 1 + k1."""
    difference = -k1(log_probs, reference)
    return torch.expm1(difference) - difference


def token_rewards(
    kl_BT: Tensor, scores_B: Tensor, ended_B: Tensor, mask_BT: Tensor, *, coefficient: float, missing_end: float
) -> Tensor:
    """PPO's reward of every token [B, T]: -coefficient * KL, and at the last token of an answer its score.

    (Stiennon et al., arXiv:2009.01325.) kl_BT is k1. An answer that did not end loses `missing_end`: taken from its
    score, since in the place of a bad score it would pay.
    """
    _check_rows(mask_BT, kl_BT=kl_BT)
    if not mask_BT.any(dim=1).all():
        raise ValueError("mask_BT has a row without a token; expected one at least in every answer")
    rewards = torch.where(mask_BT, -coefficient * kl_BT, 0.0)
    places = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last = torch.where(mask_BT, places, -1).amax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, with_missing_end(scores_B, ended_B, missing_end)[:, None].to(rewards.dtype))


def with_missing_end(scores_B: Tensor, ended_B: Tensor, missing_end: float) -> Tensor:
    """Scores [B], less `missing_end` where an answer did not come to its end."""
    return scores_B - missing_end * (~ended_B).to(scores_B.dtype)


@torch.no_grad()
def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Advantages:
    """Generalised advantage estimation (Schulman et al., arXiv:1506.02438). After a row's last token nothing comes.

    lam 0 is the one-step error of the critic, lam 1 the return less the critic's value. gamma and lam lie in [0, 1].
    """
    _check_rows(mask_BT, rewards_BT=rewards_BT, values_BT=values_BT)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma is {gamma} and lam {lam}; expected both between 0 and 1")
    rewards, values = (torch.where(mask_BT, each, 0.0) for each in (rewards_BT, values_BT))
    advantages = torch.zeros_like(values)
    ahead = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        here = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * ahead
        ahead = torch.where(mask_BT[:, t], here, ahead)
        next_value = torch.where(mask_BT[:, t], values[:, t], next_value)
        advantages[:, t] = here
    advantages = torch.where(mask_BT, advantages, 0.0)
    return Advantages(advantages, advantages + values)


def whiten(values_BT: Tensor, mask_BT: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Shift and scale the real tokens [B, T] to mean 0 and variance 1; with keep_mean only the variance changes."""
    _check_rows(mask_BT, values_BT=values_BT)
    real = values_BT[mask_BT]
    mean, spread = real.mean(), real.std(correction=0).clamp(min=1e-8)
    whitened = (values_BT - mean) / spread + (mean if keep_mean else 0.0)
    return torch.where(mask_BT, whitened, 0.0)


def group_advantages(scores_GN: Tensor) -> GroupAdvantages:
    """(score - mean) / (std + 1e-4) within each prompt's answers (GRPO, Shao et al., arXiv:2402.03300).

    Scores are [prompts, answers]. The sum over each prompt's answers is 0.
    """
    if scores_GN.ndim != 2 or scores_GN.shape[1] < 2:
        raise ValueError(f"scores_GN is {tuple(scores_GN.shape)}; expected [prompts, answers], two answers at least")
    undecided = (scores_GN == scores_GN[:, :1]).all(dim=1)
    spread, mean = torch.std_mean(scores_GN, dim=1, keepdim=True)
    # Rounding leaves equal scores a little off their mean, which so small a divisor would make much of.
    advantages = ((scores_GN - mean) / (spread + 1e-4)).masked_fill(undecided[:, None], 0.0)
    return GroupAdvantages(advantages, int(undecided.sum()))


@dataclass
class KLCoefficient:
    """What a nat of KL costs: fixed, or with a `target` (nats per answer) steered there.

    Ziegler et al., arXiv:1909.08593, section 2.2: an error of at most 20% at a time, its full effect within `horizon`
    answers. `value` is all that there is to save.
    """

    value: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, answers: int) -> None:
        """After `answers` answers with a mean KL of `kl` nats each."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * answers / self.horizon


def _check_rows(mask_BT: Tensor, **tensors: Tensor) -> None:
    if mask_BT.dtype != torch.bool or mask_BT.ndim != 2:
        raise ValueError(f"mask_BT is {mask_BT.dtype} {tuple(mask_BT.shape)}; expected bool [B, T]")
    require_same_shape(mask_BT=mask_BT, **tensors)


def require_same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}; expected the same for all")
