"""GRPO (Shao et al., arXiv:2402.03300): an answer is as good as it is better than the others to the same prompt."""

import torch
from torch import Tensor

from engine.config import AlignmentConfig
from engine.model import GPT
from rlhf.advantages import group_advantages, with_missing_end
from rlhf.experience import Experience
from rlhf.log_probs import answer_log_probs
from rlhf.losses import grpo_loss
from rlhf.rollout import Rollout
from train.tracking import RunningMetrics


class GRPO:
    """No critic: every token of an answer has the answer's advantage, and the KL is in the loss."""

    def __init__(self, config: AlignmentConfig) -> None:
        self.config, self.group = config, config.group
        self.measures = RunningMetrics()

    def values(self, rollout: Rollout) -> Tensor:
        return torch.zeros(len(rollout.sampled))

    def judge(
        self, rollout: Rollout, values_N: Tensor, kl_N: Tensor, scores_B: Tensor, coefficient: float
    ) -> tuple[Tensor, Tensor]:
        scores = with_missing_end(scores_B, rollout.ended, self.config.missing_end)
        advantages, undecided = group_advantages(scores.view(-1, self.group))
        self.measures.add({"undecided_groups": float(undecided)})
        of_tokens = advantages.view(-1).repeat_interleave(rollout.mask.sum(dim=1))
        return of_tokens, torch.zeros_like(of_tokens)

    def loss(self, policy: GPT, batch: Experience) -> Tensor:
        """Summed over the batch's targets."""
        config = self.config
        log_probs, _ = answer_log_probs(policy, batch, config.temperature)
        found = grpo_loss(
            log_probs, batch.old, batch.reference, batch.advantages, 1, beta=config.beta, clip=config.clip
        )
        sums = {"policy_loss": found.loss.detach(), "clipped": found.clipped, "approx_kl": found.approx_kl}
        self.measures.add(sums, len(batch.old))
        return found.loss
