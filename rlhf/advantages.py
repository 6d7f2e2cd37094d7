"""From scores to advantages: KL estimates, rewards per token, generalised advantage estimation, groups of answers.

Answers of different lengths are the rows of [B, T], beside a mask that is True at the tokens that the policy chose. A
value where the mask is False, even NaN, changes nothing, and every result is 0 there. Log-probabilities are in nats.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """For each token: how much better it was than expected, and the return that the critic should have expected."""

    advantages: Tensor
    returns: Tensor


def k1(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Estimate KL(policy || reference) from a token that the policy drew: unbiased, of either sign. Any shape.

    Both arguments are log-probabilities of the same tokens. Schulman 2020, http://joschu.net/blog/kl-approx.html
    """
    require_same_shape(log_probs=log_probs, reference=reference)
    return log_probs - reference


def k2(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return k1^2 / 2, for a loss: for tokens that the policy drew its gradient is that of the KL, on average.

    That of k3 is not (Tang and Munos, arXiv:2506.09477): it pulls a token that has become likelier back by 1 at most,
    however much likelier, and that of the KL by the log of how much. As the KL itself k2 is biased.
    """
    return k1(log_probs, reference).square() / 2


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Estimate the same as k1, unbiased too, but never negative and with less variance: exp(-k1) - 1 + k1."""
    difference = -k1(log_probs, reference)
    return torch.expm1(difference) - difference


def token_rewards(
    kl_BT: Tensor, scores_B: Tensor, ended_B: Tensor, mask_BT: Tensor, *, beta: float, missing_end: float
) -> Tensor:
    """Return PPO's reward of every token [B, T]: -beta * KL, plus the answer's score at its last token.

    kl_BT is k1 (Stiennon et al., arXiv:2009.01325). An answer that did not end loses `missing_end`. That is taken from
    its score and does not replace it: in the place of a worse score it would be a gain.
    """
    _check_rows(mask_BT, kl_BT=kl_BT)
    if not mask_BT.any(dim=1).all():
        raise ValueError("mask_BT has a row without a token; expected one at least in every answer")
    # KL is a price on each token here, and no term of the loss as in GRPO: GAE then carries the price of a later token
    # back to the earlier ones that led to it. It must be k1. A reward counts as a constant when the policy learns, and
    # that gives the gradient of the KL only where the estimator's own gradient is 0 on average: k1's is, k3's is not.
    rewards = torch.where(mask_BT, -beta * kl_BT, 0.0)
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last = torch.where(mask_BT, positions, -1).amax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, with_missing_end(scores_B, ended_B, missing_end)[:, None].to(rewards.dtype))


def with_missing_end(scores_B: Tensor, ended_B: Tensor, missing_end: float) -> Tensor:
    """Return the scores [B], less `missing_end` where an answer did not come to its end."""
    return scores_B - missing_end * (~ended_B).to(scores_B.dtype)


@torch.no_grad()
def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Advantages:
    """Estimate generalised advantages (Schulman et al., arXiv:1506.02438). After a row's last token the value is 0.

    lam 0 gives the one-step error of the critic, lam 1 the return less the critic's value. Both gamma and lam lie in
    [0, 1].
    """
    _check_rows(mask_BT, rewards_BT=rewards_BT, values_BT=values_BT)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma is {gamma} and lam {lam}; expected both between 0 and 1")
    rewards, values = (torch.where(mask_BT, each, 0.0) for each in (rewards_BT, values_BT))
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_advantage = torch.where(mask_BT[:, t], advantage, next_advantage)
        next_value = torch.where(mask_BT[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    advantages = torch.where(mask_BT, advantages, 0.0)
    return Advantages(advantages, advantages + values)


def whiten(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Shift and scale the tokens under the mask [B, T] to mean 0 and variance 1."""
    _check_rows(mask_BT, values_BT=values_BT)
    # Advantages are whitened over the whole round: the size of a step then does not depend on the scale of the rewards,
    # and as many tokens become likelier as become less likely. The mean is a baseline, which biases no gradient. It has
    # to be the round's, not a minibatch's: otherwise one answer would have another advantage in every pass.
    real = values_BT[mask_BT]
    mean, spread = real.mean(), real.std(correction=0).clamp(min=1e-8)
    return torch.where(mask_BT, (values_BT - mean) / spread, 0.0)


def group_advantages(scores_GN: Tensor) -> tuple[Tensor, int]:
    """Return (score - mean) / (std + 1e-4) within each prompt's answers, and how many groups teach nothing.

    Scores and advantages are [prompts, answers] (GRPO, Shao et al., arXiv:2402.03300). The sum over each prompt's
    answers is 0. A group whose answers all score the same teaches nothing.
    """
    if scores_GN.ndim != 2 or scores_GN.shape[1] < 2:
        raise ValueError(f"scores_GN is {tuple(scores_GN.shape)}; expected [prompts, answers], two answers at least")
    undecided = (scores_GN == scores_GN[:, :1]).all(dim=1)
    spread, mean = torch.std_mean(scores_GN, dim=1, keepdim=True)
    # Rounding leaves equal scores a little off their mean, and so small a divisor would blow that up.
    advantages = ((scores_GN - mean) / (spread + 1e-4)).masked_fill(undecided[:, None], 0.0)
    return advantages, int(undecided.sum())


def adapted_beta(beta: float, kl: float, target: float, answers: int) -> float:
    """Return the price of a nat of KL after `answers` answers with a mean KL of `kl` nats, steered to `target` nats.

    Ziegler et al., arXiv:1909.08593, section 2.2: an error of at most 20% counts at a time, and has its full effect
    within 10,000 answers.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * answers / 10_000)


def _check_rows(mask_BT: Tensor, **tensors: Tensor) -> None:
    if mask_BT.dtype != torch.bool or mask_BT.ndim != 2:
        raise ValueError(f"mask_BT is {mask_BT.dtype} {tuple(mask_BT.shape)}; expected bool [B, T]")
    require_same_shape(mask_BT=mask_BT, **tensors)


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, with all shapes, where the tensors differ in shape."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}; expected the same for all")
