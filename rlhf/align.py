"""Alignment runs: a finetuned model goes on learning, from rewards or from preferences, in the one training loop."""

import dataclasses
from functools import partial
from pathlib import Path

from engine.chat_template import answer_ends
from engine.checkpoint import Checkpoint, set_aside_newer
from engine.config import (
    AlignmentConfig,
    BudgetConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
)
from engine.errors import InputError
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime
from engine.tokenizer import Tokenizer
from rlhf.advantages import k1
from rlhf.dpo import DPO
from rlhf.experience import KLAlarmError, Rollouts
from rlhf.grpo import GRPO
from rlhf.ppo import PPO
from rlhf.preference_sources import open_preferences
from rlhf.preferences import encode_preferences
from rlhf.prompts import Prompts, encode_prompts
from rlhf.reward_model import RewardModel
from rlhf.rewards import ModelReward, ProgramReward, Reward
from rlhf.rollout import answer_kl, describe_answers, roll_out, rollout_log_probs
from rlhf.train_reward import PairLoader
from train.data.conversations import STORIES_BRIEF, STORIES_INSTRUCT, open_conversations
from train.finetune import finetuning_recipe, load_base
from train.loop import Outcome
from train.pretrain import Console, Data, Stage, run_stage

# Learning rates that worked on a nano model.
RATES = {"ppo": 3e-5, "grpo": 5e-5, "dpo": 3e-5, "ipo": 3e-5}
HELD_OUT = 64


def alignment_recipe(
    base: Run,
    checkpoint: Checkpoint,
    data: DataConfig,
    alignment: AlignmentConfig,
    *,
    rounds: int = 40,
    rate: float | None = None,
    batch: int = 32,
) -> Recipe:
    """The recipe that aligns a chat run: AdamW at a rate that falls to 0, over `rounds` rollouts or an epoch of pairs.

    `batch` counts answers, or rows of the context that pairs fill.
    """
    if not base.read_recipe().chat:
        raise InputError(f"{base.path} has not learnt conversations; finetune it first: gpt finetune {base.path}")
    recipe = finetuning_recipe(base, checkpoint, data)
    on_policy = alignment.method in ("ppo", "grpo")
    round_steps = alignment.answers * alignment.passes // batch
    peak = RATES[alignment.method] if rate is None else rate
    loop = dataclasses.replace(recipe.loop, batch=batch, micro_batch=None, compile=False)
    if on_policy:
        # A checkpoint a round: each has been seen to be good, or not, by the round that follows.
        every = round_steps * max(1, rounds // 10)
        loop = dataclasses.replace(loop, save_every=round_steps, evaluate_every=every, keep=max(2, loop.keep))
    return dataclasses.replace(
        recipe,
        alignment=alignment,
        budget=BudgetConfig(steps=rounds * round_steps) if on_policy else BudgetConfig(epochs=1),
        optimizer=OptimizerConfig("adamw", peak, peak, peak, peak, beta2=0.999, weight_decay=0.0, eps=1e-5),
        schedule=ScheduleConfig(shape="wsd", warmup=0.0 if on_policy else 0.05, decay=1.0 if on_policy else 0.95),
        loop=loop,
    )


def align(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, *, resume: bool = False, wandb: bool = False
) -> Outcome:
    """Align as the recipe says, from recipe.base. Otherwise as `pretrain`.

    Raises KLAlarmError, a TrainingError, where the policy leaves the reference behind; its last good checkpoint stays.
    """
    prepare = partial(prepare_policy, run=run, runtime=runtime, console=console)
    if recipe.alignment.method in ("dpo", "ipo"):
        prepare = partial(prepare_pairs, run=run, runtime=runtime, console=console)
    try:
        return run_stage(recipe, run, runtime, console, prepare, resume=resume, wandb=wandb)
    except KLAlarmError as alarm:
        set_aside_newer(run.checkpoints, alarm.good)
        raise


def prepare_pairs(recipe: Recipe, run: Run, runtime: Runtime, console: Console) -> tuple[Recipe, Stage]:
    base = load_base(recipe, run)
    tokenizer, context = Tokenizer.load(run.tokenizer), recipe.model.context
    source = open_preferences(recipe.data)
    console.say(source.describe())
    limits = {"train": recipe.data.tokens, "validation": recipe.data.final_evaluation_tokens}
    train, validation = (
        encode_preferences(source, split, tokenizer, context, max_tokens=most, progress=console.preparing(split))
        for split, most in limits.items()
    )
    dpo = DPO(recipe.alignment, load_reference(recipe, base, runtime), tokenizer)
    stage = Stage(
        Data(tokenizer, train, validation),
        PairLoader(train, recipe.tokens_per_pass, 2 * context, seed=recipe.loop.seed, whole=True),
        lambda model: [],
        base=base,
        loss=dpo.loss,
        evaluate=partial(dpo.evaluate, validation),
        measures=dpo.measures.take,
        notes=(f"train      {train.describe()}", f"reference  {recipe.base}, step {recipe.base_step}"),
    )
    return recipe, stage


def prepare_policy(recipe: Recipe, run: Run, runtime: Runtime, console: Console) -> tuple[Recipe, Stage]:
    config, base = recipe.alignment, load_base(recipe, run)
    tokenizer = Tokenizer.load(run.tokenizer)
    source = open_conversations(recipe.data)
    if source is None:
        raise InputError(
            f"{recipe.data.source} holds documents; prompts come from conversations, such as stories-instruct"
        )
    console.say(source.describe())
    group = config.group if config.method == "grpo" else 1
    rounds = -(-(recipe.budget.steps or 1) * recipe.loop.batch // (config.answers * config.passes))
    needed = {"train": rounds * config.answers // group, "validation": HELD_OUT}
    train, held_out = (
        encode_prompts(source, split, tokenizer, recipe.model.context, most) for split, most in needed.items()
    )
    reference = load_reference(recipe, base, runtime)
    reward, critic = open_reward(recipe, tokenizer, runtime)
    ppo = None
    if config.method == "ppo":
        if critic is None:
            critic = RewardModel(dataclasses.replace(recipe.model, scalar_head=True))
            critic.take_backbone(base.tensors("model"))
            # Expecting nothing is wiser than expecting anything.
            critic.head.weight.data.zero_()
        critic.to(runtime.device).compute_dtype = runtime.dtype
        ppo = PPO(config, critic, recipe.tokens_per_pass)
    ends = answer_ends(tokenizer)
    rollouts = Rollouts(recipe, train, reference, reward, ppo or GRPO(config), ends)
    rewards = {"reward": reward} | ({"gold": ProgramReward(tokenizer)} if held_out.facts[0] else {})

    def begin(config: ModelConfig) -> GPT:
        rollouts.policy = GPT(config)
        return rollouts.policy

    stage = Stage(
        Data(tokenizer, train, held_out),
        rollouts,
        partial(show_answers, tokenizer=tokenizer, prompts=held_out, ends=ends, count=recipe.loop.samples),
        base=base,
        model=begin,
        loss=rollouts.method.loss,
        evaluate=partial(evaluate_policy, recipe, reference, rewards, held_out, ends),
        measures=rollouts.method.measures.take,
        critic=ppo.critic if ppo else None,
        notes=(
            f"rollouts   {config.answers} answers, each learnt {config.passes} times; reward: {config.reward}",
            f"reference  {recipe.base}, step {recipe.base_step}",
        ),
    )
    return recipe, stage


def load_reference(recipe: Recipe, base: Checkpoint, runtime: Runtime) -> GPT:
    """The model that the policy begins as, frozen. Its weights stay fp32, or the first KL would not be 0."""
    reference = GPT(recipe.model).requires_grad_(False)
    reference.load_state_dict(base.tensors("model"))
    reference.compute_dtype = runtime.dtype
    return reference.to(runtime.device).eval()


def open_reward(recipe: Recipe, tokenizer: Tokenizer, runtime: Runtime) -> tuple[Reward, RewardModel | None]:
    """The reward of a recipe, and for a critic to begin with a second copy of its model."""
    name = recipe.alignment.reward
    if name == "program":
        if recipe.data.source not in (STORIES_INSTRUCT, STORIES_BRIEF):
            raise InputError("--reward program knows the built-in requests alone: use it with --data stories-instruct")
        return ProgramReward(tokenizer), None
    run = Run(Path(name))
    if Tokenizer.load(run.tokenizer).fingerprint != tokenizer.fingerprint:
        raise InputError(f"{run.path} has another tokenizer than the policy; train a reward model from {recipe.base}")
    model, critic = (RewardModel.load(run, runtime) for _ in range(2))
    return ModelReward(model.requires_grad_(False)), critic


def evaluate_policy(
    recipe: Recipe,
    reference: GPT,
    rewards: dict[str, Reward],
    held_out: Prompts,
    ends: frozenset[int],
    policy: GPT,
    tokens: int,
    tokens_per_batch: int,
) -> dict[str, float]:
    """Rewards and KL on held-out prompts. "loss" is what the policy minimises: beta * KL less the reward."""
    config = recipe.alignment
    prompts = [held_out[number] for number in range(len(held_out))]
    rollout = roll_out(policy, prompts, ends, temperature=config.temperature, max_tokens=config.max_tokens)
    now, _ = rollout_log_probs(policy, rollout, config.temperature, tokens_per_batch)
    before, _ = rollout_log_probs(reference, rollout, config.temperature, tokens_per_batch)
    kl = answer_kl(k1(now, before), rollout.mask)
    scores = {name: float(reward(prompts, rollout.answers).mean()) for name, reward in rewards.items()}
    measured = {**scores, "kl": kl, **describe_answers(rollout), "tokens": len(now)}
    return {"loss": config.beta * kl - scores["reward"], **measured}


def show_answers(model: GPT, *, tokenizer: Tokenizer, prompts: Prompts, ends: frozenset[int], count: int) -> list[str]:
    shown = [prompts[number] for number in range(min(count, len(prompts)))]
    answers = roll_out(model, shown, ends).answers
    return [
        f"> {tokenizer.decode(prompt.ids)}\n\n{tokenizer.decode(answer)}"
        for prompt, answer in zip(shown, answers, strict=True)
    ]
