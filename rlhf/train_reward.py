"""Training a reward model: pairs in, the one loop; the finetuned model's own answers set the scale of its rewards."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.chat_template import END, answer_ends
from engine.checkpoint import Checkpoint, write_atomically
from engine.config import DataConfig, ModelConfig, OptimizerConfig, Recipe, RewardConfig, override
from engine.errors import InputError
from engine.generate import generate
from engine.run import Run
from engine.runtime import Runtime
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from rlhf.pairs import Pairs, read_pairs
from rlhf.preferences import open_preferences
from rlhf.reward_model import ImplicitRewardModel, RewardModel
from train.data.loader import Batch
from train.finetune import finetuning_recipe, load_base
from train.stage import Console, Outcome, Stage, run_stage

# Of nano; Muon at a rate of its own tells no more pairs right and takes longer.
RATE = 5e-4
# Of an implicit one, whose every weight has learnt to write already.
IMPLICIT_RATE = 1e-4
# Answers of the finetuned model that set the scale of the rewards: their mean is 0 and their deviation 1.
ANSWERS = 128


def feedback_recipe(base: Run, checkpoint: Checkpoint, data: DataConfig, rate: float) -> Recipe:
    """Return a recipe that learns from feedback on a chat model. Raises InputError where the run is no such model.

    It is AdamW at a low rate: feedback is too little and too noisy for more daring steps.
    """
    if not base.read_recipe().chat:
        raise InputError(f"{base.path} has not learnt conversations; finetune it first: gpt finetune {base.path}")
    optimizer = OptimizerConfig("adamw", rate, rate, rate, rate, beta2=0.999, weight_decay=0.0, eps=1e-5)
    return dataclasses.replace(finetuning_recipe(base, checkpoint, data), optimizer=optimizer)


def reward_recipe(
    base: Run, checkpoint: Checkpoint, data: DataConfig, rate: float | None = None, *, implicit: bool = False
) -> Recipe:
    """Return the recipe of a reward model that begins with a finetuned run: one epoch of AdamW.

    Raises InputError where the run is no chat model, or `data` names nothing.
    """
    recipe = feedback_recipe(base, checkpoint, data, rate or (IMPLICIT_RATE if implicit else RATE))
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
            implicit = recipe.reward.implicit
            model = ImplicitRewardModel.begin(recipe, run, runtime) if implicit else RewardModel(config)
            if base:
                model.take_backbone(base.tensors("model"))
            return model

        return Stage(
            recipe,
            batches,
            evaluate=partial(evaluate_rewards, validation, answers),
            sample=lambda model: show_rewards(model, tokenizer, answers[: recipe.loop.samples]),
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
        end = [tokenizer.special[END]]
        answers = [
            [*prompt, *answer.ids, *(end if answer.finish == "stop" else [])]
            for prompt, answer in zip(prompts, said, strict=True)
        ]
        write_atomically(path, json.dumps(answers).encode())
    return json.loads(path.read_text())


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


def show_rewards(model: RewardModel, tokenizer: Tokenizer, answers: list[list[int]]) -> list[str]:
    """Return answers of the base with their rewards, as text."""
    rewards = model.score(answers).tolist()
    return [f"reward {reward:.3f}: {tokenizer.decode(ids)}" for reward, ids in zip(rewards, answers, strict=True)]
