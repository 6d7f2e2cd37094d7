"""The methods: PPO and GRPO learn from scores of the policy's own answers, DPO and IPO from preferences.

PPO: Schulman et al., arXiv:1707.06347, for language models as in Stiennon et al., arXiv:2009.01325.
GRPO: Shao et al., arXiv:2402.03300. DPO: Rafailov et al., arXiv:2305.18290. IPO: Azar et al., arXiv:2310.12036.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import AlignmentConfig, Recipe
from engine.lora import adapt
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime, inference
from engine.tokenizer import Tokenizer
from rlhf import losses
from rlhf.advantages import Advantages, gae, group_advantages, k1, token_rewards, whiten, with_missing_end
from rlhf.losses import PolicyLoss
from rlhf.preferences import PairBatch, Pairs
from rlhf.reward_model import PROGRAM, RewardModel
from rlhf.rollout import Rollout, map_rollout, sequence_log_probs, target_answers, to_rows
from rlhf.rollout_loader import Method, RolloutBatch, ScoredRollout
from train.data.loader import IGNORE_INDEX, Batch
from train.evaluation import batches_in_order
from train.tracking import RunningMetrics


class GRPO(Method):
    """An answer is as good as it is better than the others to the same prompt.

    There is no critic: every token of an answer has the answer's advantage, and the KL is in the loss.
    """

    def __init__(self, config: AlignmentConfig) -> None:
        super().__init__(config)
        self.group = config.group

    def advantages(self, rollout: ScoredRollout, beta: float) -> Advantages:
        scores = with_missing_end(rollout.scores["reward"], rollout.ended, self.config.missing_end)
        advantages, undecided = group_advantages(scores.view(-1, self.group))
        self.metrics.add({"undecided_groups": float(undecided)})
        of_tokens = advantages.view(-1).repeat_interleave(rollout.mask.sum(dim=1))
        return Advantages(of_tokens, torch.zeros_like(of_tokens))

    def policy_loss(self, log_probs: Tensor, batch: RolloutBatch) -> PolicyLoss:
        beta, clip = self.config.beta, self.config.clip
        return losses.grpo_loss(log_probs, batch.old, batch.reference, batch.advantages, beta=beta, clip=clip)


class PPO(Method):
    """Each token's KL to the reference costs, the answer's score comes with its last token, and a critic says when.

    The critic is a model of its own: what it has to learn would disturb the policy.
    """

    critic: RewardModel

    def __init__(self, config: AlignmentConfig, critic: RewardModel, tokens_per_pass: int) -> None:
        super().__init__(config)
        self.critic, self.tokens_per_pass = critic, tokens_per_pass

    def values(self, rollout: Rollout) -> Tensor:
        return map_rollout(self.critic, rollout, self.tokens_per_pass, lambda batch: (self.expect(batch),))[0]

    def expect(self, batch: Batch) -> Tensor:
        """Return the critic's value where each target of a batch is about to be chosen. fp32 [targets]"""
        critic = self.critic
        hidden = critic(batch.tokens, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        return (critic.rewards(hidden[batch.targets != IGNORE_INDEX]) - critic.mean) / critic.std

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

    def policy_loss(self, log_probs: Tensor, batch: RolloutBatch) -> PolicyLoss:
        return losses.policy_loss(log_probs, batch.old, batch.advantages, clip=self.config.clip)

    def loss(self, policy: GPT, batch: RolloutBatch) -> Tensor:
        """Return the loss of policy and critic, summed over the batch's targets."""
        of_policy = super().loss(policy, batch)
        of_values = losses.value_loss(self.expect(batch), batch.values, batch.returns, clip=self.config.clip)
        self.metrics.add({"value_loss": of_values.detach()}, len(batch.old))
        return of_policy + self.config.value_weight * of_values


def begin_critic(recipe: Recipe, base: Checkpoint, reference: GPT, runtime: Runtime) -> RewardModel:
    """Make a critic: a copy of the reward model where that has a head, else the policy's body under a head of zeros.

    Adapters, where the policy has them, are the critic's too; the body is then the reference's own.
    """
    reward = Run(Path(recipe.alignment.reward))
    if recipe.alignment.reward != PROGRAM and not reward.read_recipe().reward.implicit:
        critic = RewardModel.load(reward, runtime)
    else:
        critic = RewardModel(dataclasses.replace(recipe.model, scalar_head=True))
        shared = recipe.lora.rank > 0
        critic.take_backbone(reference.state_dict() if shared else base.weights(), share=shared)
        # It is better to expect nothing at first than to expect anything.
        critic.head_weight.data.zero_()
        critic.compute_dtype = runtime.dtype
    if recipe.lora.rank:
        adapt(critic, recipe.lora)
    return critic.to(runtime.device)


class DPO:
    """Preferences are learnt from without a reward: the loss of a batch of pairs, beside a frozen reference."""

    def __init__(self, config: AlignmentConfig, reference: GPT, tokenizer: Tokenizer) -> None:
        self.config, self.reference = config, reference
        self.header = tokenizer.header
        self.metrics = RunningMetrics()

    def loss(self, policy: GPT, batch: PairBatch) -> Tensor:
        """Return the loss summed over the pairs."""
        return self._loss(policy, batch, self.metrics)

    def evaluate(self, held_out: Pairs, policy: GPT, tokens: int, tokens_per_batch: int) -> dict[str, float]:
        """Return the loss and its metrics on the first held-out pairs, about `tokens` tokens of them."""
        metrics, read = RunningMetrics(), 0
        with inference(policy):
            for packed in batches_in_order(held_out, 2 * policy.config.context, tokens, tokens_per_batch):
                batch = PairBatch.of(packed).to(policy.embedding.weight.device)
                metrics.add({"loss": self._loss(policy, batch, metrics)}, batch.pairs)
                read += len(batch.tokens)
        return {**metrics.take(), "tokens": read}

    def _loss(self, policy: GPT, batch: PairBatch, metrics: RunningMetrics) -> Tensor:
        """Return the sum over the pairs. Its metrics are log-probabilities of whole answers, in nats."""
        if not batch.pairs:
            # One of many processes may have got no pair: its loss and its gradients, for which others wait, are 0.
            return policy.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        bounds = batch.cu_seqlens[: 2 * batch.pairs + 1]
        # Padding behind the last pair is cut off.
        pairs = PairBatch(batch.tokens[: int(bounds[-1])], batch.targets, bounds, batch.max_seqlen)
        answers = target_answers(pairs, self.header)
        chosen, rejected = sequence_log_probs(policy, answers).view(-1, 2).unbind(1)
        with torch.no_grad():
            was_chosen, was_rejected = sequence_log_probs(self.reference, answers).view(-1, 2).unbind(1)
        margin = losses.preference_margin(chosen, rejected, was_chosen, was_rejected)
        sums = {
            # The share of pairs (ties half) of which the policy has moved towards the chosen answer.
            "accuracy": (margin.detach().sign() + 1).sum() / 2,
            "chosen": chosen.detach().sum(),
            "rejected": rejected.detach().sum(),
            "chosen_change": (chosen.detach() - was_chosen).sum(),
            "rejected_change": (rejected.detach() - was_rejected).sum(),
        }
        metrics.add(sums, batch.pairs)
        if self.config.method == "ipo":
            return losses.ipo_loss(margin, beta=self.config.beta)
        return losses.dpo_loss(margin, beta=self.config.beta, label_smoothing=self.config.label_smoothing)
