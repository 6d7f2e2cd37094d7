"""The losses of PPO, GRPO, DPO and IPO, from log-probabilities.

[N] are the tokens that the policy chose, of all answers end to end; [P] are pairs. Every result is a sum over them: the
training loop divides by the number of tokens (or pairs) of the whole optimizer step, so that it does not matter how the
step is cut into micro-batches. Old and reference log-probabilities are constants.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.advantages import k2, require_same_shape

# exp(20) is 5e8: far outside of every clip range, and still finite when multiplied.
MOST_LOG_RATIO = 20.0


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
    # its score alone. Gradients flow through it, so it is k2. The paper has k3, which hardly holds a policy that has
    # left: on two of six seeds of `gpt demo` it went where the reward model is wrong (bench/README.md).
    return surrogate._replace(loss=surrogate.loss + beta * k2(log_probs_N, reference_N).sum())


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
