"""Experience: what a rollout taught, as batches for the one training loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.config import Recipe
from engine.errors import InputError
from engine.model import GPT
from engine.processes import ALONE, Processes
from rlhf.advantages import KLCoefficient, k1, k3
from rlhf.log_probs import pack_answers
from rlhf.prompts import Prompts
from rlhf.rewards import Prompt, Reward
from rlhf.rollout import TOLERANCE, WORST, Rollout, answer_kl, describe_answers, roll_out, rollout_log_probs
from train.data.loader import IGNORE_INDEX, Batch
from train.loop import TrainingError
from train.tracking import RunningMetrics

# The sum of k1 over an answer may be negative by chance, its mean over many answers hardly.
LEAST_KL = -1.0


class KLAlarmError(TrainingError):
    """The policy has left the reference behind. Up to step `good` it had not."""

    def __init__(self, message: str, good: int) -> None:
        super().__init__(message)
        self.good = good


@dataclass(frozen=True)
class Drawn:
    """Some answers of a round and what models make of each of their tokens, fp32 [tokens] each, on the CPU.

    `error` is how far the sampler's log-probability was from the trainer's. Rewards have one score an answer.
    """

    rollout: Rollout
    old: Tensor
    entropy: Tensor
    error: Tensor
    reference: Tensor
    values: Tensor
    scores: Mapping[str, Tensor]

    @staticmethod
    def join(parts: Sequence["Drawn"]) -> "Drawn":
        rollout = Rollout(
            [prompt for part in parts for prompt in part.rollout.prompts],
            [answer for part in parts for answer in part.rollout.answers],
            *(torch.cat([getattr(part.rollout, name) for part in parts]) for name in ("ended", "sampled")),
        )
        of_tokens = ("old", "entropy", "error", "reference", "values")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in of_tokens}
        scores = {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores}
        return Drawn(rollout, **joined, scores=scores)


@dataclass(frozen=True)
class Experience(Batch):
    """Packed prompts and answers. Beside each target, in their order: fp32 [targets] each.

    Log-probabilities of the policy that drew it and of the reference, its advantage, and what PPO's critic expected
    and should have.
    """

    old: Tensor
    reference: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor

    @property
    def answers(self) -> int:
        return len(self.cu_seqlens) - 1

    def select(self, rows: Sequence[int]) -> "Experience":
        """These answers, in this order."""
        lengths = self.cu_seqlens.diff().tolist()
        learnt = torch.stack([(part != IGNORE_INDEX).sum() for part in self.targets.split(lengths)]).tolist()

        def pick(tensor: Tensor) -> Tensor:
            parts = tensor.split(lengths if len(tensor) == len(self.tokens) else learnt)
            return torch.cat([parts[row] for row in rows])

        tensors = {name: pick(value) for name, value in vars(self).items() if name not in ("cu_seqlens", "max_seqlen")}
        bounds = torch.tensor([0, *(lengths[row] for row in rows)], device=self.cu_seqlens.device)
        return Experience(**tensors, cu_seqlens=bounds.cumsum(0).int(), max_seqlen=self.max_seqlen)

    def part(self, first: int, last: int) -> "Experience":
        return self.select(range(first, last))


class Method(Protocol):
    """What PPO and GRPO do differently."""

    measures: RunningMetrics
    # Answers to each prompt.
    group: int

    def values(self, rollout: Rollout) -> Tensor:
        """What is expected before each token of the answers. fp32 [tokens], on the CPU."""
        ...

    def judge(
        self, rollout: Rollout, values_N: Tensor, kl_N: Tensor, scores_B: Tensor, coefficient: float
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns of every token, [tokens] each."""
        ...

    def loss(self, policy: GPT, batch: Experience) -> Tensor: ...


class Rollouts:
    """The batches of a policy that learns from its own answers (train.loop.Batches).

    When all answers of a rollout have been dealt `passes` times, each time in another order, the policy as it is then
    draws new ones. What is handed out is `micro` answers at a time.

    Of many processes each draws its part of the answers, and learns its part of each batch; what lies between, whitened
    advantages and the like, they all reckon from all answers.
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
        """The policy learns from the one of `rewards` that is called "reward"; the others are for the log."""
        self.recipe, self.config, self.prompts = recipe, recipe.alignment, prompts
        self.reference, self.rewards, self.method, self.ends = reference, rewards, method, ends
        self.processes = processes
        self.policy = reference  # until there is one
        self.micro = recipe.loop.micro_batch or recipe.loop.batch
        if self.config.answers % recipe.loop.batch:
            raise InputError(
                f"alignment.answers {self.config.answers} is not a multiple of the batch of {recipe.loop.batch}"
            )
        if self.micro < processes.count:
            raise InputError(f"a micro-batch of {self.micro} answers is too small for {processes.count} processes")
        self.coefficient = KLCoefficient(self.config.beta, self.config.kl_target)
        self.rounds = 0
        self.tokens = 0  # of prompts and answers handed out, to all processes
        self.held: Experience | None = None
        self.order: list[list[int]] = []  # of the rows of `held`, that have yet to be handed out

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

    def __next__(self) -> Experience:
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

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; in the middle of a round with all that it has yet to hand out."""
        held = {}
        if self.held is not None and self.order:
            held = {name: value.tolist() for name, value in vars(self.held).items() if isinstance(value, Tensor)}
        counted = {"rounds": self.rounds, "tokens": self.tokens, "beta": self.coefficient.value}
        return {**counted, "order": self.order, "held": held, "prompts": self.prompts.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["prompts"] != self.prompts.fingerprint:
            raise InputError("this run cannot be resumed with other prompts; start a new run")
        self.rounds, self.coefficient.value, self.order = state["rounds"], state["beta"], state["order"]
        # Older checkpoints have not counted: such a run counts from there.
        self.tokens = state.get("tokens", 0)
        dtypes = {"tokens": torch.int64, "targets": torch.int64, "cu_seqlens": torch.int32}
        held = {name: torch.tensor(each, dtype=dtypes.get(name)) for name, each in state["held"].items()}
        self.held = Experience(**held, max_seqlen=self.policy.config.context) if held else None

    def _round(self) -> Experience:
        """Draw answers, have them judged, and see whether the policy is still in its senses."""
        first = self.rounds * self.prompts_per_round
        prompts = self.prompts.deal(first, self.prompts_per_round, self.recipe.loop.seed)
        prompts = [prompt for prompt in prompts for _ in range(self.method.group)]
        # From the generator that checkpoints hold, the main process's.
        seed = self.processes.collect(int(torch.randint(2**62, ())))[0]
        drawn = Drawn.join(self.processes.collect(self._draw(prompts, seed)))
        rollout, scores = drawn.rollout, drawn.scores
        kl_N = k1(drawn.old, drawn.reference)
        kl = answer_kl(kl_N, rollout.mask)
        self.method.measures.add(
            {
                "round": self.rounds + 1,
                **{name: float(each.mean()) for name, each in scores.items()},
                "reward_std": float(scores["reward"].std()),
                "kl": kl,
                "kl_k3": answer_kl(k3(drawn.old, drawn.reference), rollout.mask),
                "beta": self.coefficient.value,
                "entropy": float(drawn.entropy.mean()),
                **self._sampler_error(drawn.error),
                **describe_answers(rollout),
            }
        )
        self._watch(kl)
        score, price = scores["reward"], self.coefficient.value
        advantages, returns = self.method.judge(rollout, drawn.values, kl_N, score, price)
        if self.rounds < self.config.critic_rounds:
            advantages = torch.zeros_like(advantages)
        self.coefficient.update(kl, len(prompts))
        self.rounds += 1
        batch = pack_answers([prompt.ids for prompt in prompts], rollout.answers, self.policy.config.context)
        return Experience(
            **vars(batch),
            old=drawn.old,
            reference=drawn.reference,
            values=drawn.values,
            advantages=advantages,
            returns=returns,
        )

    def _draw(self, prompts: Sequence[Prompt], seed: int) -> Drawn:
        """This process's part of the answers."""
        config, tokens = self.config, self.recipe.tokens_per_pass
        rank, count = self.processes.rank, self.processes.count
        first = len(prompts) * rank // count
        prompts = prompts[first : len(prompts) * (rank + 1) // count]
        how = {"temperature": config.temperature, "max_tokens": config.max_tokens, "seed": seed, "first": first}
        rollout = roll_out(self.policy, prompts, self.ends, **how)  # type: ignore[arg-type]
        old, entropy = rollout_log_probs(self.policy, rollout, config.temperature, tokens)
        reference, _ = rollout_log_probs(self.reference, rollout, config.temperature, tokens)
        ours = old
        if config.temperature != 1:
            ours, _ = rollout_log_probs(self.policy, rollout, 1.0, tokens)
        scores = {name: reward(prompts, rollout.answers) for name, reward in self.rewards.items()}
        error, values = (rollout.sampled - ours).abs(), self.method.values(rollout)
        return Drawn(rollout, old, entropy, error, reference, values, scores)

    def _watch(self, kl: float) -> None:
        if not LEAST_KL <= kl <= self.config.kl_budget:  # NaN is not either
            raise KLAlarmError(
                f"KL alarm: after {self.rounds} rounds the answers are {kl:.2f} nats from the reference; expected "
                f"{LEAST_KL:g} to {self.config.kl_budget:g} (alignment.kl_budget). A higher beta, or lower learning "
                "rates, keep the policy closer",
                good=max(0, self.rounds - 1) * self.steps_per_round,
            )

    def _sampler_error(self, error: Tensor) -> dict[str, float]:
        """Raises TrainingError where the sampler's log-probabilities are too far from the trainer's."""
        mean, worst = float(error.mean()), float(error.max())
        # Coarser formats round the cached keys and values as well.
        if self.recipe.precision == "fp32" and not (mean <= TOLERANCE and worst <= WORST):
            raise TrainingError(
                f"sampler and trainer disagree by {mean:.1e} nats a token, {worst:.1e} at most; expected {TOLERANCE:g} "
                f"and {WORST:g}"
            )
        return {"sampler_error": mean, "sampler_error_worst": worst}
