"""From scores to advantages and losses: KL estimates, rewards per token, GAE, groups; PPO, GRPO, DPO and IPO.

Answers of different lengths are the rows of [B, T], beside a mask that is True at the tokens that the policy chose. A
value where the mask is False, even NaN, changes nothing, and every result is 0 there. Log-probabilities are in nats.

For the losses [N] are the tokens of all answers end to end; [P] are pairs. Every loss is a sum over them: the training
loop divides by the number of tokens (or pairs) of the whole optimizer step, so that it does not matter how the step is
cut into micro-batches. Old and reference log-probabilities are constants.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# exp(20) is 5e8: far outside of every clip range, and still finite when multiplied.
MOST_LOG_RATIO = 20.0


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


class PolicyLoss(NamedTuple):
    """The loss, the number of tokens beyond the clip range, and (log ratio)^2 / 2, summed over tokens."""

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor


def policy_loss(log_probs_N: Tensor, old_N: Tensor, advantages_N: Tensor, *, clip: float = 0.2) -> PolicyLoss:
    """Return PPO's clipped surrogate (Schulman et al., arXiv:1707.06347)."""
    require_same_shape(log_probs_N=log_probs_N, old_N=old_N, advantages_N=advantages_N)
    log_ratio = (log_probs_N - old_N).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    ratio = log_ratio.exp()
    gains = torch.minimum(ratio * advantages_N, ratio.clamp(1 - clip, 1 + clip) * advantages_N)
    with torch.no_grad():
        clipped = ((ratio - 1).abs() > clip).sum()
        approx_kl = log_ratio.square().sum() / 2
    return PolicyLoss(-gains.sum(), clipped, approx_kl)


def value_loss(values_N: Tensor, old_N: Tensor, returns_N: Tensor, *, clip: float = 0.2) -> Tensor:
    """Return half the squared error of the critic, or of its value held within `clip` of the old one if that is worse.

    From the baselines of PPO (Huang et al. 2022, "The 37 implementation details of PPO", detail 9).
    """
    require_same_shape(values_N=values_N, old_N=old_N, returns_N=returns_N)
    free = (values_N - returns_N).square()
    held = (old_N + (values_N - old_N).clamp(-clip, clip) - returns_N).square()
    return torch.maximum(free, held).sum() / 2


def grpo_loss(
    log_probs_N: Tensor, old_N: Tensor, reference_N: Tensor, advantages_N: Tensor, *, beta: float, clip: float = 0.2
) -> PolicyLoss:
    """Return the clipped surrogate plus beta times the KL to the reference (Shao et al., arXiv:2402.03300)."""
    # Every token weighs the same, as in DAPO (arXiv:2503.14476). The paper takes the mean within each answer first: a
    # token of a long answer then counts less than one of a short answer, so a long bad answer is hardly punished, and
    # answers grow longer without growing better.
    surrogate = policy_loss(log_probs_N, old_N, advantages_N, clip=clip)
    # KL is a term of the loss here, and no part of the reward as in PPO: an answer's rank in its group then depends on
    # its score alone. Gradients flow through it, so it is k3: the gradient of k1 is 0 on average. No log-probability
    # counts as further below the reference than this, or one token's k3 would overflow the sum.
    near = torch.maximum(log_probs_N, reference_N - MOST_LOG_RATIO)
    return surrogate._replace(loss=surrogate.loss + beta * k3(near, reference_N).sum())


def preference_margin(
    chosen_P: Tensor, rejected_P: Tensor, reference_chosen_P: Tensor, reference_rejected_P: Tensor
) -> Tensor:
    """Return how much more than the reference the policy prefers the chosen answers: log of a ratio of ratios [P].

    All four are log-probabilities of whole answers, summed over their tokens.
    """
    return (chosen_P - reference_chosen_P) - (rejected_P - reference_rejected_P)


def dpo_loss(margin_P: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return -log sigmoid(beta * margin) (Rafailov et al., arXiv:2305.18290), the margin as of preference_margin.

    label_smoothing is the share of labels believed to be wrong, below 1/2: conservative DPO (Mitchell 2023).
    """
    right, wrong = F.logsigmoid(beta * margin_P), F.logsigmoid(-beta * margin_P)
    return -((1 - label_smoothing) * right + label_smoothing * wrong).sum()


def ipo_loss(margin_P: Tensor, *, beta: float) -> Tensor:
    """Return (margin - 1 / (2 beta))^2 (Azar et al., arXiv:2310.12036).

    Unlike DPO's loss it does not widen a margin that is wide enough, however sure the labels are.
    """
    return (margin_P - 1 / (2 * beta)).square().sum()
