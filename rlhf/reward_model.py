"""Rewards: a program or a reward model scores answers; a reward model is trained on pairs, in the one training loop."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import records
from engine.chat_template import Message, answer_ends, answered
from engine.checkpoint import EVALUATION, Checkpoint, checkpoints
from engine.config import DataConfig, ModelConfig, OptimizerConfig, Recipe, RewardConfig, override
from engine.disk import write_atomically
from engine.errors import InputError
from engine.generate import generate
from engine.lora import freeze
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime, inference
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from rlhf.preferences import Pairs, open_preferences, read_pairs
from rlhf.prompts import Prompt
from rlhf.rollout import sequence_log_probs, split_by_tokens, target_answers
from train.data.loader import Batch
from train.data.stories import StoryScore, score_story
from train.evaluation import Case, Scorer
from train.finetune import finetuning_recipe, load_base
from train.stage import Outcome, Stage
from train.tracking import Console
from train.trainer import run_stage

PROGRAM = "program"
# How many tokens are scored at a time, unless one sequence alone is longer.
SCORING_TOKENS = 8192
# This rate suits nano, which is so wide; Muon at a rate of its own tells no more pairs right and takes longer.
RATE, USUAL_WIDTH = 5e-4, 128
# An implicit reward model learns more slowly: each of its weights has learnt to write already.
IMPLICIT_RATE = 1e-4
# Adapters learn best at about ten times the rate of the weights (Biderman et al., arXiv:2405.09673).
ADAPTER_RATE = 10
# So many answers of the finetuned model set the scale of the rewards: their mean is 0 and their deviation 1.
ANSWERS = 128

# The score of each answer (token ids, with the end token where there is one) to its prompt: fp32 [n], on the CPU.
Reward = Callable[[Sequence[Prompt], Sequence[Sequence[int]]], Tensor]


class ProgramReward:
    """A Reward that says how well a story answers a request for one, in [0, 1]: train/data/stories/requests.py."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ends = tokenizer, answer_ends(tokenizer)

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([score.total for score in self.scores(prompts, answers)])

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[StoryScore]:
        """Return the scores with their parts. Raises ValueError for a prompt without facts."""
        scores = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if prompt.facts is None:
                raise ValueError("a prompt has no facts; the program scores answers to the built-in requests alone")
            text = self.tokenizer.decode([token for token in answer if token not in self.ends])
            scores.append(score_story(prompt.facts, text))
        return scores


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the evaluation of a reward model says of the rewards of the finetuned model's own answers."""

    sample_mean: float
    sample_std: float


class RewardModel(GPT):
    """A reward model: it scores a conversation by the hidden state at its last token, the <|end|> of the answer.

    The head is fp32 and has no bias, which no comparison could teach it. `mean` and `std` are those of the rewards of
    the finetuned model's own answers; `score` counts from there.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if self.head is not None:
            # As in Stiennon et al. 2020: rewards begin with a standard deviation near 1.
            nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.width + 1))
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.register_buffer("std", torch.ones(()), persistent=False)

    @staticmethod
    def begin(recipe: Recipe, run: Run, runtime: Runtime) -> "RewardModel":
        """Make one that has not learnt yet. An implicit one needs the base of its run; raises InputError without it."""
        if not recipe.reward.implicit:
            return RewardModel(recipe.model)
        header = Tokenizer.load(run.tokenizer).header
        return ImplicitRewardModel(recipe.model, load_reference(recipe, runtime), header, recipe.reward.beta)

    @staticmethod
    def load(run: Run, runtime: Runtime, which: str = "latest") -> "RewardModel":
        """Load the trained reward model of a run, normalised. Raises InputError where the run holds none."""
        recipe = run.read_recipe()
        if not recipe.scores:
            raise InputError(f"{run.path} is no reward model; train one with `gpt reward {run.path}`")
        found = run.find_checkpoint(which)
        go_on = "go on with `gpt reward ... --resume`, which measures it"
        try:
            scale = records.read(found.path / EVALUATION, Scale, go_on)
        except FileNotFoundError:
            raise InputError(f"{found.path} was not measured to its end; {go_on}") from None
        model = RewardModel.begin(recipe, run, runtime)
        model.load_state_dict(found.weights())
        model.normalise(scale.sample_mean, scale.sample_std)
        model.compute_dtype = runtime.dtype
        return model.to(runtime.device).eval()

    def normalise(self, mean: float, std: float) -> None:
        # A reward model learns differences alone, so where 0 lies and how far 1 is are left to chance. Scaled by the
        # finetuned model's own answers (0 is a typical one, 1 is a standard deviation above), a beta or a penalty means
        # the same beside every reward model, and the critic's values begin near 0.
        self.mean.fill_(mean)
        self.std.fill_(max(std, 1e-6))

    def take_backbone(self, weights: dict[str, Tensor], *, share: bool = False) -> None:
        """Take the weights of a language model, all but its head where this one has a head of its own to score with.

        Where they are to `share`, they stay those of the other model too: no copy is made.
        """
        own = {"head.weight": self.head_weight} if self.config.scalar_head else {}
        self.load_state_dict({**weights, **own}, assign=share)

    def rewards(self, hidden: Tensor) -> Tensor:
        """Return the reward of every hidden state, before normalisation. [..., C] -> fp32 [...]"""
        return F.linear(hidden.float(), self.head_weight.float())[..., 0]

    def last_rewards(self, batch: Batch) -> Tensor:
        """Return the reward of every packed sequence, at its last token, before normalisation. fp32 [sequences]"""
        hidden = self(batch.tokens, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        return self.rewards(hidden[batch.cu_seqlens[1:].long() - 1])

    def score(self, sequences: Sequence[Sequence[int]], tokens_per_batch: int = SCORING_TOKENS) -> Tensor:
        """Return normalised rewards of whole conversations (token ids), in order: fp32 [n], on the CPU.

        A conversation scores the same whatever is scored beside it. Raises InputError for one that is empty or longer
        than the context.
        """
        for number, sequence in enumerate(sequences):
            if not 0 < len(sequence) <= self.config.context:
                raise InputError(
                    f"sequence {number} has {len(sequence)} tokens; a reward needs 1 to {self.config.context}"
                )
        device, found = self.embedding.weight.device, [torch.empty(0)]
        with inference(self):
            for rows in split_by_tokens([*map(len, sequences)], tokens_per_batch):
                some = sequences[rows.start : rows.stop]
                tokens = torch.tensor([token for each in some for token in each], device=device)
                bounds = torch.tensor([0, *map(len, some)], dtype=torch.int32, device=device).cumsum(0).int()
                rewards = self.last_rewards(Batch(tokens, tokens, bounds, max(map(len, some))))
                found.append(((rewards - self.mean) / self.std).cpu())
        return torch.cat(found)

    def score_answers(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> Tensor:
        """Score answers to prompts, as a Reward."""
        return self.score([[*prompt.ids, *answer] for prompt, answer in zip(prompts, answers, strict=True)])


class ImplicitRewardModel(RewardModel):
    """A language model as a reward model: beta times the log of how much likelier it finds an answer than the base.

    Rafailov et al., arXiv:2305.18290, section 5: every language model is one. Where a model is small and comparisons
    are few, it orders far more of them correctly than a head on the last hidden state: each token is already judged by
    what was asked for, which need not first be gathered in the last state.
    """

    def __init__(self, config: ModelConfig, reference: GPT, header: Sequence[int], beta: float) -> None:
        super().__init__(config)
        self.header, self.beta = header, beta
        self._reference = (reference,)  # in a tuple it is no part of this module: neither trained nor saved

    def share_reference(self) -> None:
        """Take the reference's weights, without a copy: for adapters beside them to learn."""
        self.take_backbone(self._reference[0].state_dict(), share=True)

    def last_rewards(self, batch: Batch) -> Tensor:
        """Return the reward of the last answer of every packed conversation, before normalisation. fp32 [sequences]"""
        answers = target_answers(batch, self.header)
        with torch.no_grad():
            before = sequence_log_probs(self._reference[0], answers)
        return self.beta * (sequence_log_probs(self, answers) - before)


def load_frozen(run: Run, runtime: Runtime, which: str, context: int | None = None) -> GPT:
    """Load a model to draw from and to compare with. Its weights stay fp32, or a policy's first KL would not be 0."""
    model, _ = run.load_model(dataclasses.replace(runtime, precision="fp32"), which)
    model.compute_dtype = runtime.dtype
    model.config = dataclasses.replace(model.config, context=context or model.config.context)
    return model.requires_grad_(False)


def load_reference(recipe: Recipe, runtime: Runtime) -> GPT:
    """Load the model that a run begins as, frozen. Raises InputError where other weights are in its place.

    Where adapters learn, its weights are kept as theirs are, so that the trained model can share them.
    """
    base, step = Run(Path(str(recipe.base))), recipe.base_step
    model = load_frozen(base, runtime, str(step), recipe.model.context)
    weights = next(each.checksum("model") for each in checkpoints(base.checkpoints) if each.step == step)
    if recipe.base_weights not in (None, weights):
        raise InputError(f"{base.path} has other weights at step {step} than what began with it: bring these back")
    if recipe.lora.rank:
        freeze(model)
    return model


def open_reward(name: str, tokenizer: Tokenizer, runtime: Runtime, facts: bool) -> Reward:
    """Open a reward by its name: `program`, or the run of a reward model.

    Raises InputError where the program has no facts to go by, or the model reads other tokens.
    """
    if name == PROGRAM:
        if not facts:
            raise InputError("the program knows the built-in requests alone: use it with --data stories-instruct")
        return ProgramReward(tokenizer)
    run = Run(Path(name))
    model = RewardModel.load(run, runtime)
    if Tokenizer.load(run.tokenizer).fingerprint != tokenizer.fingerprint:
        raise InputError(f"{run.path} has another tokenizer than the policy; train a reward model from the same run")
    return model.requires_grad_(False).score_answers


def open_rewards(
    name: str | None, prompts: Sequence[Prompt], tokenizer: Tokenizer, runtime: Runtime
) -> dict[str, Reward]:
    """Open what is measured of answers to prompts: "reward", the named one, and "gold", the program's.

    There is no "reward" without a name, and no "gold" where the prompts have no facts for it.
    """
    gold = {"gold": ProgramReward(tokenizer)} if prompts[0].facts else {}
    named = {"reward": open_reward(name, tokenizer, runtime, bool(gold))} if name else {}
    return {**named, **gold}


def weights_of(reward: str) -> str | None:
    """Return the SHA-256 of a reward model's weights, by which it is known; None for the program."""
    return None if reward == PROGRAM else Run(Path(reward)).find_checkpoint().checksum("model")


def open_scorer(run: Run, runtime: Runtime) -> Scorer:
    """Make the reward model of a run score texts for train.evaluation. What is too long for it loses its end."""
    model, tokenizer = RewardModel.load(run, runtime), Tokenizer.load(run.tokenizer)
    context = model.config.context

    def score(cases: Sequence[Case], texts: Sequence[str]) -> list[float]:
        sequences = []
        for case, text in zip(cases, texts, strict=True):
            if isinstance(case.prompt, str):
                raise InputError("a reward model scores answers in conversations: use it with --data stories-instruct")
            ids = answered(tokenizer, [*case.prompt, Message("assistant", text)])
            sequences.append([*ids[:-1][: context - 1], ids[-1]])
        return model.score(sequences).tolist()

    return score


def feedback_recipe(base: Run, checkpoint: Checkpoint, data: DataConfig, rate: float | None, *, usual: float) -> Recipe:
    """Return a recipe that learns from feedback on a chat model. Raises InputError where the run is no such model.

    It is AdamW at a low rate: feedback is too little and too noisy for more daring steps. Without a `rate` it is the
    usual one, for an imported model by its width (see engine/huggingface.py).
    """
    before = base.read_recipe()
    if not before.chat:
        raise InputError(f"{base.path} has not learnt conversations; finetune it first: gpt finetune {base.path}")
    share = min(1.0, USUAL_WIDTH / before.model.width) if before.model.family != "auto" else 1.0
    rate = share * usual if rate is None else rate
    critic = share * OptimizerConfig.critic_rate
    optimizer = OptimizerConfig("adamw", rate, rate, rate, rate, critic, beta2=0.999, weight_decay=0.0, eps=1e-5)
    optimizer = dataclasses.replace(optimizer, adapter_rate=ADAPTER_RATE * rate)
    return dataclasses.replace(finetuning_recipe(base, checkpoint, data), optimizer=optimizer)


def reward_recipe(
    base: Run, checkpoint: Checkpoint, data: DataConfig, rate: float | None = None, *, implicit: bool = False
) -> Recipe:
    """Return the recipe of a reward model that begins with a finetuned run: one epoch of AdamW.

    Raises InputError where the run is no chat model, or `data` names nothing.
    """
    recipe = feedback_recipe(base, checkpoint, data, rate or None, usual=IMPLICIT_RATE if implicit else RATE)
    open_preferences(data)
    return override(recipe, "reward.implicit" if implicit else "model.scalar_head", True)


def train_reward(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, *, resume: bool = False, wandb: bool = False
) -> Outcome:
    """Train a reward model as the recipe says, from recipe.base. Otherwise as `pretrain`."""

    def prepare(recipe: Recipe) -> Stage:
        if recipe.reward.implicit and recipe.loop.shard:
            raise InputError("an implicit reward model is compared with its base, token by token: leave out --shard")
        base = None if resume and run.has_checkpoint() else load_base(recipe, run)
        tokenizer = Tokenizer.load(run.tokenizer)
        train, validation, batches = read_pairs(recipe, tokenizer, runtime, console)
        answers = own_answers(recipe, run, validation, runtime)

        def begin(config: ModelConfig) -> RewardModel:
            model = RewardModel.begin(recipe, run, runtime)
            if recipe.lora.rank and isinstance(model, ImplicitRewardModel):
                model.share_reference()
            elif base:
                model.take_backbone(base.weights())
            return model

        def show(model: RewardModel) -> list[str]:
            """Return some answers of the base with their rewards, as text."""
            shown = answers[: recipe.loop.samples]
            rewards = model.score(shown).tolist()
            return [f"reward {r:.3f}: {tokenizer.decode(ids)}" for r, ids in zip(rewards, shown, strict=True)]

        return Stage(
            recipe,
            batches,
            evaluate=partial(evaluate_rewards, validation, answers),
            sample=show,
            amounts=train.amounts(validation),
            model=begin,
            loss=partial(preference_loss, config=recipe.reward),
            notes=(
                *train.describe_beside(validation),
                f"scale      {len(answers)} answers of the base to held-out prompts: mean 0, deviation 1",
                f"base       {recipe.base}, step {recipe.base_step}",
            ),
        )

    return run_stage(recipe, run, runtime, console, prepare, resume=resume, wandb=wandb)


def own_answers(recipe: Recipe, run: Run, held_out: Pairs, runtime: Runtime) -> list[list[int]]:
    """Return what the base says to held-out prompts, as whole conversations.

    They are kept in the run, because its base may be gone later.
    """
    path = run.path / "answers.json"
    if not path.exists():
        model, tokenizer = Run(Path(str(recipe.base))).load_model(runtime, str(recipe.base_step))
        model.config = dataclasses.replace(model.config, context=recipe.model.context)
        prompts = [held_out.prompt(number) for number in range(min(ANSWERS, len(held_out)))]
        prompts = (prompts * -(-ANSWERS // len(prompts)))[:ANSWERS]
        said = generate(model, tokenizer, prompts, Sampling(seed=0), stop_ids=answer_ends(tokenizer))
        end = tokenizer.ends[:1]
        answers = [
            [*prompt, *answer.ids, *(end if answer.finish == "stop" else [])]
            for prompt, answer in zip(prompts, said, strict=True)
        ]
        write_atomically(path, json.dumps(answers))
    mend = "delete it: the base is then asked again"
    answers = records.read(path, list[list[int]], mend)
    vocabulary = range(recipe.model.vocab_size)
    if any(token not in vocabulary for answer in answers for token in answer):
        raise InputError(f"{path} is damaged: it holds tokens beyond the vocabulary of {len(vocabulary):,}; {mend}")
    return answers


def preference_loss(model: RewardModel, batch: Batch, config: RewardConfig) -> Tensor:
    """Return the Bradley-Terry loss of packed pairs (sequences 2k and 2k + 1: chosen, rejected), summed, in nats.

    -log sigmoid(r_chosen - r_rejected - margin) + centring * (r_chosen + r_rejected)**2: the second term settles what
    the first leaves open, where 0 lies (Eisenstein et al. 2023). A sequence left over is padding.
    """
    rewards = model.last_rewards(batch)
    chosen, rejected = rewards[: len(rewards) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
    return (config.centring * (chosen + rejected) ** 2 - F.logsigmoid(chosen - rejected - config.margin)).sum()


def evaluate_rewards(
    held_out: Pairs, answers: list[list[int]], model: RewardModel, tokens: int, tokens_per_batch: int
) -> dict[str, float]:
    """Measure the first pairs that hold `tokens` tokens, and the scale: what `RewardModel.load` normalises by."""
    count = min(len(held_out), int(held_out.lengths.cumsum().searchsorted(tokens)) + 1)
    sequences = [ids for number in range(count) for ids in held_out.pair(number)]
    chosen, rejected = model.score(sequences, tokens_per_batch).view(-1, 2).unbind(1)
    metrics = measure_preferences(chosen, rejected)
    gold = held_out.gold[:count]
    known = torch.tensor([better is not None for better in gold])
    if known.any():
        # Where the judge erred, the better answer is the rejected one.
        sign = torch.tensor([1.0 if better else -1.0 for better in gold])
        metrics["gold_accuracy"] = measure_preferences((sign * chosen)[known], (sign * rejected)[known])["accuracy"]
    own = model.score(answers, tokens_per_batch)
    scale = {"sample_mean": float(own.mean()), "sample_std": float(own.std(correction=0))}
    return {**metrics, **scale, "pairs": count, "tokens": sum(map(len, sequences))}


def measure_preferences(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """Measure how well rewards [pairs] predict which answer was chosen.

    Ties count half; the loss is without margin, in nats. The calibration error (Naeini et al. 2015) compares, in ten
    bins of confidence, the share of pairs told right with the model's probability: the sigmoid of the difference.
    """
    difference = (chosen - rejected).double()
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    confidence = difference.abs().sigmoid()
    bins = (20 * (confidence - 0.5)).long().clamp(0, 9)
    gaps = torch.zeros(10, dtype=torch.float64).index_add(0, bins, right - confidence)
    metrics = {
        "loss": float(-F.logsigmoid(difference).mean()),
        "accuracy": float(right.mean()),
        "calibration_error": float(gaps.abs().sum() / len(difference)),
    }
    for name, rewards in (("chosen", chosen), ("rejected", rejected)):
        metrics |= {f"{name}_mean": float(rewards.mean()), f"{name}_std": float(rewards.std(correction=0))}
    return metrics
