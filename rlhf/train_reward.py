"""Training a reward model: pairs in, the one loop; the finetuned model's own answers set the scale of its rewards."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from engine.chat_template import END, answer_ends
from engine.checkpoint import Checkpoint, write_atomically
from engine.config import DataConfig, ModelConfig, OptimizerConfig, Recipe, override
from engine.errors import InputError
from engine.generate import generate
from engine.run import Run
from engine.runtime import Runtime
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from rlhf.preference_sources import open_preferences
from rlhf.preferences import Pairs, encode_preferences
from rlhf.reward_model import ImplicitRewardModel, RewardModel, measure_preferences, preference_loss
from train.data.loader import IGNORE_INDEX, Batch, PackedLoader
from train.finetune import finetuning_recipe, load_base
from train.stage import Amounts, Console, Outcome, Stage, run_stage

# Of nano; Muon at a rate of its own tells no more pairs right and takes longer.
RATE = 5e-4
# Of an implicit one, whose every weight has learnt to write already.
IMPLICIT_RATE = 1e-4
# Answers of the finetuned model that set the scale of the rewards: their mean is 0 and their deviation 1.
ANSWERS = 128


@dataclasses.dataclass(frozen=True)
class PairBatch(Batch):
    """Packed pairs: sequences 2k and 2k + 1 are chosen and rejected. One left over at the end is padding."""

    group: ClassVar[int] = 2

    @classmethod
    def of(cls, batch: Batch) -> "PairBatch":
        """From pairs that are packed as one sequence each, in which a mark says where the chosen conversation ends."""
        middles = (batch.targets != IGNORE_INDEX).nonzero()[:, 0] + 1
        bounds = torch.cat((batch.cu_seqlens, middles.int())).sort().values
        return cls(batch.tokens, batch.targets, bounds, batch.max_seqlen)

    @property
    def pairs(self) -> int:
        return (len(self.cu_seqlens) - 1) // 2


class PairLoader(PackedLoader):
    """Batches of whole pairs."""

    def _read(self, plan: list[tuple[int, int, int]]) -> PairBatch:
        return PairBatch.of(super()._read(plan))


def adamw(rate: float) -> OptimizerConfig:
    """What feedback is learnt with: it is too little and too noisy for more daring steps."""
    return OptimizerConfig("adamw", rate, rate, rate, rate, beta2=0.999, weight_decay=0.0, eps=1e-5)


def reward_recipe(
    base: Run, checkpoint: Checkpoint, data: DataConfig, rate: float | None = None, *, implicit: bool = False
) -> Recipe:
    """The recipe of a reward model that begins with a finetuned run: one epoch of AdamW.

    Raises InputError where the run is no chat model, or `data` names nothing.
    """
    if not base.read_recipe().chat:
        raise InputError(f"{base.path} has not learnt conversations; finetune it first: gpt finetune {base.path}")
    open_preferences(data)
    rate = rate or (IMPLICIT_RATE if implicit else RATE)
    recipe = dataclasses.replace(finetuning_recipe(base, checkpoint, data), optimizer=adamw(rate))
    return override(recipe, "reward.implicit" if implicit else "model.scalar_head", True)


def train_reward(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, *, resume: bool = False, wandb: bool = False
) -> Outcome:
    """Train a reward model as the recipe says, from recipe.base. Otherwise as `pretrain`."""

    def prepare(recipe: Recipe) -> Stage:
        require_room_for_pairs(recipe)
        if recipe.reward.implicit and recipe.loop.shard:
            raise InputError("an implicit reward model is compared with its base, token by token: leave out --shard")
        base = None if resume and run.has_checkpoint() else load_base(recipe, run)
        tokenizer = Tokenizer.load(run.tokenizer)
        train, validation, batches = read_pairs(recipe, tokenizer, runtime, console)
        answers = own_answers(recipe, run, validation, runtime)
        return Stage(
            recipe,
            batches,
            evaluate=partial(evaluate_rewards, validation, answers),
            sample=lambda model: show_rewards(model, tokenizer, answers[: recipe.loop.samples]),
            amounts=amounts_of_pairs(train, validation),
            model=partial(begin, base, recipe, run, runtime),
            loss=partial(preference_loss, config=recipe.reward),
            notes=(
                *train.describe_beside(validation),
                f"scale      {len(answers)} answers of the base to held-out prompts: mean 0, deviation 1",
                f"base       {recipe.base}, step {recipe.base_step}",
            ),
        )

    return run_stage(recipe, run, runtime, console, prepare, resume=resume, wandb=wandb)


def require_room_for_pairs(recipe: Recipe) -> None:
    """Raises InputError where a pass may not hold a pair. To be asked before anything is written."""
    if recipe.tokens_per_pass < 2 * recipe.model.context:
        raise InputError("a pair takes up to two rows: --batch and loop.micro_batch must be 2 or more")


def read_pairs(
    recipe: Recipe, tokenizer: Tokenizer, runtime: Runtime, console: Console
) -> tuple[Pairs, Pairs, PairLoader]:
    """The pairs to train on and those held out, and the batches of the former."""
    source, context = open_preferences(recipe.data), recipe.model.context
    console.say(source.describe())
    limits = {"train": recipe.data.tokens, "validation": recipe.data.final_evaluation_tokens}
    train, validation = (
        encode_preferences(source, split, tokenizer, context, max_tokens=most, progress=console.preparing(split))
        for split, most in limits.items()
    )
    batches = PairLoader(
        train, recipe.tokens_per_pass, 2 * context, seed=recipe.loop.seed, processes=runtime.processes, whole=True
    )
    return train, validation, batches


def amounts_of_pairs(train: Pairs, validation: Pairs) -> Amounts:
    """How many pairs there are, and how many of them so many steps learn."""
    return Amounts(
        f"{len(train):,} pairs to train on, {len(validation):,} pairs to validate",
        lambda steps, epochs: f"about {epochs * len(train):,.0f} pairs, {epochs:.2f} epochs",
    )


def begin(base: Checkpoint | None, recipe: Recipe, run: Run, runtime: Runtime, config: ModelConfig) -> RewardModel:
    if recipe.reward.implicit:
        model: RewardModel = ImplicitRewardModel.begin(recipe, run, runtime)
    else:
        model = RewardModel(config)
    if base:
        model.take_backbone(base.tensors("model"))
    return model


def own_answers(recipe: Recipe, run: Run, held_out: Pairs, runtime: Runtime) -> list[list[int]]:
    """What the base says to held-out prompts, as whole conversations. Kept in the run: its base may be gone later."""
    path = run.path / "answers.json"
    if not path.exists():
        model, tokenizer = Run(Path(str(recipe.base))).load_model(runtime, str(recipe.base_step))
        model.config = dataclasses.replace(model.config, context=recipe.model.context)
        prompts = [held_out.prompt(number) for number in range(min(ANSWERS, len(held_out)))]
        prompts = (prompts * -(-ANSWERS // len(prompts)))[:ANSWERS]
        said = generate(model, tokenizer, prompts, Sampling(seed=0), stop_ids=answer_ends(tokenizer))
        end = [tokenizer.special[END]]
        answers = [
            [*prompt, *answer.ids, *(end if answer.finish == "stop" else [])]
            for prompt, answer in zip(prompts, said, strict=True)
        ]
        write_atomically(path, json.dumps(answers).encode())
    return json.loads(path.read_text())


def evaluate_rewards(
    held_out: Pairs, answers: list[list[int]], model: RewardModel, tokens: int, tokens_per_batch: int
) -> dict[str, float]:
    """Measures on the first pairs that hold `tokens` tokens, and the scale: what `RewardModel.load` normalises by."""
    count = min(len(held_out), int(held_out.lengths.cumsum().searchsorted(tokens)) + 1)
    sequences = [ids for number in range(count) for ids in held_out.pair(number)]
    chosen, rejected = model.score(sequences, tokens_per_batch).view(-1, 2).unbind(1)
    measured = measure_preferences(chosen, rejected)
    gold = held_out.gold[:count]
    known = torch.tensor([better is not None for better in gold])
    if known.any():
        # Where the judge erred, the better answer is the rejected one.
        sign = torch.tensor([1.0 if better else -1.0 for better in gold])
        measured["gold_accuracy"] = measure_preferences((sign * chosen)[known], (sign * rejected)[known])["accuracy"]
    own = model.score(answers, tokens_per_batch)
    scale = {"sample_mean": float(own.mean()), "sample_std": float(own.std(correction=0))}
    return {**measured, **scale, "pairs": count, "tokens": sum(map(len, sequences))}


def show_rewards(model: RewardModel, tokenizer: Tokenizer, answers: list[list[int]]) -> list[str]:
    """Answers of the base with their rewards."""
    rewards = model.score(answers).tolist()
    return [f"reward {reward:.3f}: {tokenizer.decode(ids)}" for reward, ids in zip(rewards, answers, strict=True)]
