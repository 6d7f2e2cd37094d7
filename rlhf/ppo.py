"""PPO (Schulman et al., arXiv:1707.06347) for language models, as in Stiennon et al., arXiv:2009.01325."""

import dataclasses
from pathlib import Path

from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import AlignmentConfig, Recipe
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime
from rlhf.advantages import Advantages, gae, k1, token_rewards, whiten, with_missing_end
from rlhf.losses import policy_loss, value_loss
from rlhf.reward_model import PROGRAM, RewardModel
from rlhf.rollout import Rollout, answer_log_probs, map_rollout, to_rows
from rlhf.rollout_loader import Method, RolloutBatch, ScoredRollout
from train.data.loader import IGNORE_INDEX, Batch


class PPO(Method):
    """Each token's KL to the reference costs, the answer's score comes with its last token, and a critic says when.

    The critic is a model of its own: what it has to learn would disturb the policy.
    """

    critic: RewardModel

    def __init__(self, config: AlignmentConfig, critic: RewardModel, tokens_per_pass: int) -> None:
        super().__init__(config)
        self.critic, self.tokens_per_pass = critic, tokens_per_pass

    def values(self, rollout: Rollout) -> Tensor:
        (values,) = map_rollout(
            self.critic, rollout, self.tokens_per_pass, lambda batch: (critic_values(self.critic, batch),)
        )
        return values

    def advantages(self, rollout: ScoredRollout, beta: float) -> Advantages:
        mask, missing_end = rollout.mask, self.config.missing_end
        # Scores count from their mean: a critic that expects nothing yet would take a bad score for the fault of the
        # last tokens, the only ones that a lam below 1 lets hear of it, and would teach the policy never to end an
        # answer.
        scores = rollout.scores["reward"]
        scores = scores - with_missing_end(scores, rollout.ended, missing_end).mean()
        kl = to_rows(k1(rollout.old, rollout.reference), mask)
        rewards = token_rewards(kl, scores, rollout.ended, mask, beta=beta, missing_end=missing_end)
        advantages, returns = gae(rewards, to_rows(rollout.values, mask), mask, lam=self.config.lam)
        unexplained = (returns[mask] - rollout.values).var() / returns[mask].var()
        self.metrics.add({"explained": 1 - unexplained})
        return Advantages(whiten(advantages, mask)[mask], returns[mask])

    def loss(self, policy: GPT, batch: RolloutBatch) -> Tensor:
        """Return the loss of policy and critic, summed over the batch's targets."""
        config = self.config
        log_probs, _ = answer_log_probs(policy, batch, config.temperature)
        of_policy = policy_loss(log_probs, batch.old, batch.advantages, clip=config.clip)
        of_values = value_loss(critic_values(self.critic, batch), batch.values, batch.returns, clip=config.clip)
        sums = {
            "policy_loss": of_policy.loss.detach(),
            "value_loss": of_values.detach(),
            "clipped": of_policy.clipped,
            "approx_kl": of_policy.approx_kl,
        }
        self.metrics.add(sums, len(batch.old))
        return of_policy.loss + config.value_weight * of_values


def critic_values(critic: RewardModel, batch: Batch) -> Tensor:
    """Return the critic's value where each target of a batch is about to be chosen. fp32 [targets]"""
    hidden = critic(batch.tokens, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
    return (critic.rewards(hidden[batch.targets != IGNORE_INDEX]) - critic.mean) / critic.std


def begin_critic(recipe: Recipe, base: Checkpoint, runtime: Runtime) -> RewardModel:
    """Make a critic: a copy of the reward model where that has a head, else the policy's body under a head of zeros."""
    reward = Run(Path(recipe.alignment.reward))
    if recipe.alignment.reward != PROGRAM and not reward.read_recipe().reward.implicit:
        return RewardModel.load(reward, runtime)
    critic = RewardModel(dataclasses.replace(recipe.model, scalar_head=True))
    critic.take_backbone(base.tensors("model"))
    # To expect nothing at first is better than to expect anything.
    critic.head.weight.data.zero_()
    critic.compute_dtype = runtime.dtype
    return critic.to(runtime.device)
