"""The losses of PPO, GRPO, DPO and IPO, from log-probabilities.

Tokens are those that the policy chose, of all answers end to end [N]; pairs are [P]. Every result is a sum divided by
the `count` that the caller gives, the tokens (or pairs) of a whole optimizer step: the results of its micro-batches
add up exactly to those of the step. Old and reference log-probabilities are constants.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.advantages import k3, require_same_shape

# exp(20) is 5e8: far outside of every clip range, and still finite when multiplied.
MOST_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """`clipped` is the share of tokens beyond the clip range, `approx_kl` the mean of (log ratio)^2 / 2."""

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor


class ValueLoss(NamedTuple):
    loss: Tensor
    clipped: Tensor  # the share of tokens whose clipped value is further off, so that it counts


class PreferenceLoss(NamedTuple):
    """`accuracy` is the share of pairs (ties half) of which the policy has moved towards the chosen answer."""

    loss: Tensor
    accuracy: Tensor


def policy_loss(
    log_probs_N: Tensor, old_N: Tensor, advantages_N: Tensor, count: int, *, clip: float = 0.2
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al., arXiv:1707.06347)."""
    _check(count, log_probs_N=log_probs_N, old_N=old_N, advantages_N=advantages_N)
    log_ratio = (log_probs_N - old_N).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    ratio = log_ratio.exp()
    gains = torch.minimum(ratio * advantages_N, ratio.clamp(1 - clip, 1 + clip) * advantages_N)
    with torch.no_grad():
        clipped = ((ratio - 1).abs() > clip).sum() / count
        approx_kl = log_ratio.square().sum() / (2 * count)
    return PolicyLoss(-gains.sum() / count, clipped, approx_kl)


def value_loss(values_N: Tensor, old_N: Tensor, returns_N: Tensor, count: int, *, clip: float = 0.2) -> ValueLoss:
    """Half the squared error of the critic, or of its value held within `clip` of the old one, whichever is worse.

    From the baselines of PPO (Huang et al. 2022, "The 37 implementation details of PPO", detail 9).
    """
    _check(count, values_N=values_N, old_N=old_N, returns_N=returns_N)
    free = (values_N - returns_N).square()
    held = (old_N + (values_N - old_N).clamp(-clip, clip) - returns_N).square()
    return ValueLoss(torch.maximum(free, held).sum() / (2 * count), (held > free).detach().sum() / count)


def grpo_loss(
    log_probs_N: Tensor,
    old_N: Tensor,
    reference_N: Tensor,
    advantages_N: Tensor,
    count: int,
    *,
    beta: float,
    clip: float = 0.2,
) -> PolicyLoss:
    """The clipped surrogate and beta times the KL to the reference, by k3, in the loss itself (arXiv:2402.03300).

    Every token weighs the same, as in DAPO (arXiv:2503.14476): the mean within each answer would favour long bad ones.
    """
    surrogate = policy_loss(log_probs_N, old_N, advantages_N, count, clip=clip)
    # Never more unlike the reference than this, or one token's k3 would overflow the sum.
    near = torch.maximum(log_probs_N, reference_N - MOST_LOG_RATIO)
    return surrogate._replace(loss=surrogate.loss + beta * k3(near, reference_N).sum() / count)


def dpo_loss(
    chosen_P: Tensor,
    rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    count: int,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """-log sigmoid(beta * margin) (Rafailov et al., arXiv:2305.18290), of summed log-probabilities of whole answers.

    label_smoothing is the share of labels believed to be wrong, below 1/2: conservative DPO (Mitchell 2023).
    """
    margin = preference_margin(chosen_P, rejected_P, reference_chosen_P, reference_rejected_P)
    _check(count, chosen_P=chosen_P)
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    loss = -((1 - label_smoothing) * right + label_smoothing * wrong).sum() / count
    return PreferenceLoss(loss, _accuracy(margin, count))


def ipo_loss(
    chosen_P: Tensor,
    rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    count: int,
    *,
    beta: float,
) -> PreferenceLoss:
    """(margin - 1 / (2 beta))^2 (Azar et al., arXiv:2310.12036): unlike DPO's, a margin that is wide enough stays."""
    margin = preference_margin(chosen_P, rejected_P, reference_chosen_P, reference_rejected_P)
    _check(count, chosen_P=chosen_P)
    return PreferenceLoss((margin - 1 / (2 * beta)).square().sum() / count, _accuracy(margin, count))


def preference_margin(
    chosen_P: Tensor, rejected_P: Tensor, reference_chosen_P: Tensor, reference_rejected_P: Tensor
) -> Tensor:
    """How much more than the reference the policy prefers the chosen answers: log of a ratio of ratios [P]."""
    return (chosen_P - reference_chosen_P) - (rejected_P - reference_rejected_P)


def _accuracy(margin_P: Tensor, count: int) -> Tensor:
    return (torch.sign(margin_P.detach()) + 1).sum() / (2 * count)


def _check(count: int, **tensors: Tensor) -> None:
    if count < 1:
        raise ValueError(f"count is {count}; expected 1 at least")
    require_same_shape(**tensors)
