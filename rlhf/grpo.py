"""GRPO (Shao et al., arXiv:2402.03300): an answer is as good as it is better than the others to the same prompt."""

import torch
from torch import Tensor

from engine.config import AlignmentConfig
from engine.model import GPT
from rlhf.advantages import Advantages, group_advantages, with_missing_end
from rlhf.losses import grpo_loss
from rlhf.rollout import answer_log_probs
from rlhf.rollout_loader import Method, RolloutBatch, ScoredRollout


class GRPO(Method):
    """There is no critic: every token of an answer has the answer's advantage, and the KL is in the loss."""

    def __init__(self, config: AlignmentConfig) -> None:
        super().__init__(config)
        self.group = config.group

    def advantages(self, rollout: ScoredRollout, beta: float) -> Advantages:
        scores = with_missing_end(rollout.scores["reward"], rollout.ended, self.config.missing_end)
        advantages, undecided = group_advantages(scores.view(-1, self.group))
        self.metrics.add({"undecided_groups": float(undecided)})
        of_tokens = advantages.view(-1).repeat_interleave(rollout.mask.sum(dim=1))
        return Advantages(of_tokens, torch.zeros_like(of_tokens))

    def loss(self, policy: GPT, batch: RolloutBatch) -> Tensor:
        config = self.config
        log_probs, _ = answer_log_probs(policy, batch, config.temperature)
        found = grpo_loss(log_probs, batch.old, batch.reference, batch.advantages, beta=config.beta, clip=config.clip)
        sums = {"policy_loss": found.loss.detach(), "clipped": found.clipped, "approx_kl": found.approx_kl}
        self.metrics.add(sums, len(batch.old))
        return found.loss
