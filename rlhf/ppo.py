"""PPO (Schulman et al., arXiv:1707.06347) for language models, as in Stiennon et al., arXiv:2009.01325."""

import torch
from torch import Tensor

from engine.config import AlignmentConfig
from engine.model import GPT
from engine.runtime import inference
from rlhf.advantages import gae, token_rewards, whiten, with_missing_end
from rlhf.experience import Experience
from rlhf.log_probs import answer_log_probs, to_rows
from rlhf.losses import policy_loss, value_loss
from rlhf.reward_model import RewardModel
from rlhf.rollout import Rollout, pack_part, passes
from train.data.loader import IGNORE_INDEX, Batch
from train.tracking import RunningMetrics


class PPO:
    """Each token's KL to the reference costs, the answer's score comes with its last one, and a critic says when.

    The critic is a model of its own: what it has to learn would disturb the policy.
    """

    group = 1

    def __init__(self, config: AlignmentConfig, critic: RewardModel, tokens_per_pass: int) -> None:
        self.config, self.critic, self.tokens_per_pass = config, critic, tokens_per_pass
        self.measures = RunningMetrics()

    def judge(
        self, rollout: Rollout, values_N: Tensor, kl_N: Tensor, scores_B: Tensor, coefficient: float
    ) -> tuple[Tensor, Tensor]:
        mask = rollout.mask
        # Counted from their mean: a critic that expects nothing yet would take a bad score for the fault of the last
        # tokens, which are all that a lam below 1 shows it to, and teach the policy never to end an answer.
        scores_B = scores_B - with_missing_end(scores_B, rollout.ended, self.config.missing_end).mean()
        rewards = token_rewards(
            to_rows(kl_N, mask),
            scores_B,
            rollout.ended,
            mask,
            coefficient=coefficient,
            missing_end=self.config.missing_end,
        )
        advantages, returns = gae(rewards, to_rows(values_N, mask), mask, lam=self.config.lam)
        unexplained = (returns[mask] - values_N).var() / returns[mask].var()
        self.measures.add({"explained": 1 - unexplained})
        return whiten(advantages, mask)[mask], returns[mask]

    def loss(self, policy: GPT, batch: Experience) -> Tensor:
        """Of policy and critic, summed over the batch's targets."""
        config = self.config
        log_probs, _ = answer_log_probs(policy, batch, config.temperature)
        of_policy = policy_loss(log_probs, batch.old, batch.advantages, 1, clip=config.clip)
        of_values = value_loss(critic_values(self.critic, batch), batch.values, batch.returns, 1, clip=config.clip)
        self.measures.add(
            {
                "policy_loss": of_policy.loss.detach(),
                "value_loss": of_values.loss.detach(),
                "clipped": of_policy.clipped,
                "approx_kl": of_policy.approx_kl,
            },
            len(batch.old),
        )
        return of_policy.loss + config.value_weight * of_values.loss

    def values(self, rollout: Rollout) -> Tensor:
        values = []
        with inference(self.critic):
            for part in passes(rollout, self.tokens_per_pass):
                batch = pack_part(rollout, part, self.critic.config.context)
                values.append(critic_values(self.critic, batch.to(self.critic.embedding.weight.device)).cpu())
        return torch.cat(values)


def critic_values(critic: RewardModel, batch: Batch) -> Tensor:
    """The critic's value where each target of a batch is about to be chosen. fp32 [targets]"""
    hidden = critic(batch.tokens, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
    return (critic.rewards(hidden[batch.targets != IGNORE_INDEX]) - critic.mean) / critic.std
