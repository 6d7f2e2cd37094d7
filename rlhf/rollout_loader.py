"""The batches of a policy that learns from its own answers: rounds of drawing, scoring and learning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.config import AlignmentConfig, Recipe
from engine.errors import InputError
from engine.model import GPT
from engine.processes import ALONE, Processes
from rlhf.advantages import Advantages, adapted_beta, k1, k3
from rlhf.losses import PolicyLoss
from rlhf.prompts import Prompt, Prompts
from rlhf.reward_model import Reward, RewardModel
from rlhf.rollout import (
    Rollout,
    answer_kl,
    answer_log_probs,
    describe_answers,
    pack_answers,
    roll_out,
    rollout_log_probs,
)
from train.data.loader import IGNORE_INDEX, Batch
from train.stage import TrainingError
from train.tracking import RunningMetrics

# k1 is a noisy estimate of the KL: for one answer it may be negative, but its mean over a round is near 0 or above. A
# mean below this value means that something is wrong.
LEAST_KL = -1.0
# The largest differences allowed between log-probabilities of sampler and trainer in fp32: mean and maximum.
TOLERANCE = 1e-5
WORST = 1e-4


class KLAlarmError(TrainingError):
    """The KL of the policy to the reference is out of bounds. Up to step `good` it was within them."""

    def __init__(self, message: str, good: int) -> None:
        super().__init__(message)
        self.good = good


@dataclass(frozen=True)
class ScoredRollout(Rollout):
    """A rollout with its scores, and with outputs of the models for each token of the answers.

    `old` and `reference` are log-probabilities of the policy and of the reference, `entropy` is that of the policy's
    distribution, `values` are the critic's estimates, and `error` is the difference between the log-probabilities of
    sampler and trainer: fp32 [tokens] each, on the CPU. `scores` holds, for each reward, one score per answer.
    """

    old: Tensor
    entropy: Tensor
    error: Tensor
    reference: Tensor
    values: Tensor
    scores: Mapping[str, Tensor]


def _join(values: Sequence[Any]) -> Any:
    """Return all parts as one, in order."""
    if isinstance(values[0], Tensor):
        return torch.cat([*values])
    if isinstance(values[0], Mapping):
        return {name: _join([each[name] for each in values]) for name in values[0]}
    return [item for each in values for item in each]


@dataclass(frozen=True)
class RolloutBatch(Batch):
    """Packed prompts and answers, with five numbers for each target, in the order of the targets: fp32 [targets] each.

    `old` is its log-probability under the policy that drew it, `reference` that under the reference; then there are its
    advantage, the value that PPO's critic predicted, and the return that it should have predicted.
    """

    old: Tensor
    reference: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor

    @property
    def answers(self) -> int:
        return len(self.cu_seqlens) - 1

    def select(self, rows: Sequence[int]) -> "RolloutBatch":
        """Return these answers, in this order."""
        lengths = self.cu_seqlens.diff().tolist()
        learnt = torch.stack([(part != IGNORE_INDEX).sum() for part in self.targets.split(lengths)]).tolist()

        def pick(tensor: Tensor) -> Tensor:
            parts = tensor.split(lengths if len(tensor) == len(self.tokens) else learnt)
            return torch.cat([parts[row] for row in rows])

        tensors = {name: pick(value) for name, value in vars(self).items() if name not in ("cu_seqlens", "max_seqlen")}
        bounds = torch.tensor([0, *(lengths[row] for row in rows)], device=self.cu_seqlens.device)
        return RolloutBatch(**tensors, cu_seqlens=bounds.cumsum(0).int(), max_seqlen=self.max_seqlen)

    def part(self, first: int, last: int) -> "RolloutBatch":
        return self.select(range(first, last))


class Method:
    """The base class of PPO and GRPO, which turn scores into advantages and compute the loss in their own ways."""

    # The model that is trained beside the policy, where there is one.
    critic: RewardModel | None = None

    def __init__(self, config: AlignmentConfig) -> None:
        self.config, self.metrics = config, RunningMetrics()
        self.group = 1  # answers to each prompt

    def values(self, rollout: Rollout) -> Tensor:
        """Return the critic's estimate before each token of the answers, 0 without one. fp32 [tokens], on the CPU."""
        return torch.zeros(len(rollout.sampled))

    def advantages(self, rollout: ScoredRollout, beta: float) -> Advantages:
        """Return advantages and returns of every token, [tokens] each. A nat of KL costs `beta`."""
        raise NotImplementedError

    def policy_loss(self, log_probs: Tensor, batch: RolloutBatch) -> PolicyLoss:
        """Return the loss of the policy, given its log-probabilities of the batch's targets."""
        raise NotImplementedError

    def loss(self, policy: GPT, batch: RolloutBatch) -> Tensor:
        """Return the loss summed over the batch's targets."""
        found = self.policy_loss(answer_log_probs(policy, batch, self.config.temperature)[0], batch)
        sums = {"policy_loss": found.loss.detach(), "clipped": found.clipped, "approx_kl": found.approx_kl}
        self.metrics.add(sums, len(batch.old))
        return found.loss


class RolloutLoader:
    """The batches of a policy that learns from its own answers (train.data.loader.Batches), `micro` answers at a time.

    In a round the current policy draws answers, they are scored, and all of them are handed out `passes` times, each
    time in another order. Then the next round begins.

    Each process draws its own part of the answers, and trains on its own part of each batch. The steps in between, such
    as whitening the advantages, are computed by every process from all answers.
    """

    def __init__(
        self,
        recipe: Recipe,
        prompts: Prompts,
        reference: GPT,
        rewards: Mapping[str, Reward],
        method: Method,
        ends: frozenset[int],
        processes: Processes = ALONE,
    ) -> None:
        """Let the policy learn from the reward that is called "reward"; the others are for the log."""
        self.recipe, self.config, self.prompts = recipe, recipe.alignment, prompts
        self.reference, self.rewards, self.method, self.ends = reference, rewards, method, ends
        self.processes = processes
        self.policy = reference  # a placeholder: rlhf/align.py sets the policy as soon as the model is made
        self.micro = recipe.loop.micro_batch or recipe.loop.batch
        if self.config.answers % recipe.loop.batch:
            raise InputError(
                f"alignment.answers {self.config.answers} is not a multiple of the batch of {recipe.loop.batch}"
            )
        if self.micro < processes.count:
            raise InputError(f"a micro-batch of {self.micro} answers is too small for {processes.count} processes")
        self.beta = self.config.beta  # what a nat of KL costs
        self.rounds = 0
        self.tokens = 0  # of prompts and answers handed out, to all processes
        self.held: RolloutBatch | None = None
        self.order: list[list[int]] = []  # the rows of `held` that have yet to be handed out

    @property
    def prompts_per_round(self) -> int:
        return self.config.answers // self.method.group

    @property
    def steps_per_round(self) -> int:
        return self.config.answers * self.config.passes // self.recipe.loop.batch

    @property
    def epoch(self) -> float:
        return self.rounds * self.prompts_per_round / len(self.prompts)

    def batches_per_epoch(self) -> float:
        micro_batches = self.config.answers * self.config.passes / self.micro
        return len(self.prompts) / self.prompts_per_round * micro_batches

    def close(self) -> None:
        pass

    def give_up(self) -> None:
        pass

    def __next__(self) -> RolloutBatch:
        if not self.order:
            self.held = self._round()
            orders = [torch.randperm(self.held.answers) for _ in range(self.config.passes)]
            self.order = [
                rows.tolist() for order in self.processes.collect(orders)[0] for rows in order.split(self.micro)
            ]
        assert self.held is not None
        rows = self.order.pop(0)
        self.tokens += int(self.held.cu_seqlens.diff()[rows].sum())
        return self.held.select(rows[self.processes.rank :: self.processes.count])

    def _round(self) -> RolloutBatch:
        """Draw answers, score them, check that the policy is near its reference, and compute the advantages."""
        first = self.rounds * self.prompts_per_round
        prompts = self.prompts.deal(first, self.prompts_per_round, self.recipe.loop.seed)
        prompts = [prompt for prompt in prompts for _ in range(self.method.group)]
        # The main process draws the seed from its random generator. Checkpoints hold the state of that generator, so a
        # resumed run draws the same answers.
        seed = self.processes.collect(int(torch.randint(2**62, ())))[0]
        # All processes know the prompts, and that the parts lie in the order of the ranks.
        drawn = {name: value for name, value in vars(self._draw(prompts, seed)).items() if name != "prompts"}
        rollout = ScoredRollout(prompts, **_join(self.processes.collect(drawn)))
        kl = answer_kl(k1(rollout.old, rollout.reference), rollout.mask)
        self.method.metrics.add(
            {
                "round": self.rounds + 1,
                **{name: float(each.mean()) for name, each in rollout.scores.items()},
                "reward_std": float(rollout.scores["reward"].std()),
                "kl": kl,
                "kl_k3": answer_kl(k3(rollout.old, rollout.reference), rollout.mask),
                "beta": self.beta,
                "entropy": float(rollout.entropy.mean()),
                "sampler_error": float(rollout.error.mean()),
                "sampler_error_worst": float(rollout.error.max()),
                **describe_answers(rollout),
            }
        )
        self._check(kl, rollout.error)
        advantages, returns = self.method.advantages(rollout, self.beta)
        if self.rounds < self.config.critic_rounds:
            # Only the critic learns in these rounds: without advantages the policy gets no gradient.
            advantages = torch.zeros_like(advantages)
        if self.config.kl_target is not None:
            self.beta = adapted_beta(self.beta, kl, self.config.kl_target, len(prompts))
        self.rounds += 1
        batch = pack_answers([prompt.ids for prompt in prompts], rollout.answers, self.policy.config.context)
        kept = {name: getattr(rollout, name) for name in ("old", "reference", "values")}
        return RolloutBatch(**vars(batch), **kept, advantages=advantages, returns=returns)

    def _draw(self, prompts: Sequence[Prompt], seed: int) -> ScoredRollout:
        """Draw and score this process's part of the answers."""
        config, tokens = self.config, self.recipe.tokens_per_pass
        rank, count = self.processes.rank, self.processes.count
        first = len(prompts) * rank // count
        prompts = prompts[first : len(prompts) * (rank + 1) // count]
        rollout = roll_out(
            self.policy,
            prompts,
            self.ends,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            seed=seed,
            first=first,
        )
        old, entropy = rollout_log_probs(self.policy, rollout, config.temperature, tokens)
        reference, _ = rollout_log_probs(self.reference, rollout, config.temperature, tokens)
        # The sampler reports log-probabilities at temperature 1, so those of the trainer are compared at 1 as well.
        at_1 = old if config.temperature == 1 else rollout_log_probs(self.policy, rollout, 1.0, tokens)[0]
        return ScoredRollout(
            **vars(rollout),
            old=old,
            entropy=entropy,
            error=(rollout.sampled - at_1).abs(),
            reference=reference,
            values=self.method.values(rollout),
            scores={name: reward(prompts, rollout.answers) for name, reward in self.rewards.items()},
        )

    def _check(self, kl: float, error: Tensor) -> None:
        """Raise TrainingError if sampler and trainer disagree, KLAlarmError if the KL is outside its bounds."""
        mean, worst = float(error.mean()), float(error.max())
        # They are compared in fp32 only: in bf16 and fp16 the KV cache is rounded, so the sampler rightly differs.
        if self.recipe.precision == "fp32" and not (mean <= TOLERANCE and worst <= WORST):
            raise TrainingError(
                f"sampler and trainer disagree by {mean:.1e} nats a token, {worst:.1e} at most; expected {TOLERANCE:g} "
                f"and {WORST:g}"
            )
        if not LEAST_KL <= kl <= self.config.kl_budget:  # NaN lies outside, too
            raise KLAlarmError(
                f"KL alarm: after {self.rounds} rounds the answers are {kl:.2f} nats from the reference; expected "
                f"{LEAST_KL:g} to {self.config.kl_budget:g} (alignment.kl_budget). A higher beta, or lower learning "
                "rates, keep the policy closer",
                good=max(0, self.rounds - 1) * self.steps_per_round,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able. Within a round it includes the answers that have yet to be handed out."""
        held = {}
        if self.held is not None and self.order:
            held = {name: value.tolist() for name, value in vars(self.held).items() if isinstance(value, Tensor)}
        counted = {"rounds": self.rounds, "tokens": self.tokens, "beta": self.beta}
        # A copy: the state is written while the next batches are handed out.
        return {**counted, "order": [*self.order], "held": held, "prompts": self.prompts.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that state. Raises InputError if it belongs to other prompts."""
        if state["prompts"] != self.prompts.fingerprint:
            raise InputError("this run cannot be resumed with other prompts; start a new run")
        self.rounds, self.beta, self.order = state["rounds"], state["beta"], state["order"]
        # Older checkpoints have no count of tokens. Such a run counts from its resume on.
        self.tokens = state.get("tokens", 0)
        dtypes = {"tokens": torch.int64, "targets": torch.int64, "cu_seqlens": torch.int32}
        held = {name: torch.tensor(each, dtype=dtypes.get(name)) for name, each in state["held"].items()}
        self.held = RolloutBatch(**held, max_seqlen=self.policy.config.context) if held else None
