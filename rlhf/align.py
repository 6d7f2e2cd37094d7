"""Alignment runs: a finetuned model goes on learning, from rewards or from preferences, in the one training loop."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from engine.chat_template import answer_ends
from engine.checkpoint import Checkpoint, set_aside_newer
from engine.config import (
    AlignmentConfig,
    BudgetConfig,
    DataConfig,
    ModelConfig,
    Recipe,
    ScheduleConfig,
    override,
)
from engine.errors import InputError
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime, choose
from engine.tokenizer import Tokenizer
from rlhf.dpo import DPO
from rlhf.experience import KLAlarmError, Rollouts
from rlhf.frontier import measure_policy
from rlhf.grpo import GRPO
from rlhf.ppo import PPO
from rlhf.preference_sources import open_preferences
from rlhf.prompts import encode_prompts, open_prompts, prompts_of
from rlhf.reward_model import RewardModel, load_frozen
from rlhf.rewards import PROGRAM, ProgramReward, Prompt, Reward, open_reward
from rlhf.rollout import roll_out
from rlhf.train_reward import adamw, amounts_of_pairs, read_pairs, require_room_for_pairs
from rlhf.watch import Watch
from train.data.conversations import StoryRequests, open_conversations
from train.finetune import finetuning_recipe, load_base
from train.stage import Amounts, Console, Outcome, Stage, run_stage
from train.tracking import measure_parts

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

    `batch` counts answers, or rows of the context that pairs fill. Raises InputError where the run is no chat model, or
    `data` names nothing.
    """
    if not base.read_recipe().chat:
        raise InputError(f"{base.path} has not learnt conversations; finetune it first: gpt finetune {base.path}")
    recipe = finetuning_recipe(base, checkpoint, data)
    on_policy = alignment.method in ("ppo", "grpo")
    open_prompts(data) if on_policy else open_preferences(data)
    round_steps = max(1, alignment.answers * alignment.passes // batch)
    peak = RATES[alignment.method] if rate is None else rate
    loop = dataclasses.replace(recipe.loop, batch=batch, micro_batch=None, compile=False)
    if on_policy:
        alignment = dataclasses.replace(alignment, reward_weights=weights_of(alignment.reward))
        # A checkpoint a round: each has been seen to be good, or not, by the round that follows.
        every = round_steps * max(1, rounds // 10)
        keep = max(2, loop.keep)
        loop = dataclasses.replace(loop, log_every=1, save_every=round_steps, evaluate_every=every, keep=keep)
    return dataclasses.replace(
        recipe,
        alignment=alignment,
        budget=BudgetConfig(steps=rounds * round_steps) if on_policy else BudgetConfig(epochs=1),
        optimizer=adamw(peak),
        schedule=ScheduleConfig(shape="wsd", warmup=0.0 if on_policy else 0.05, decay=1.0 if on_policy else 0.95),
        loop=loop,
    )


def align(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, *, resume: bool = False, wandb: bool = False
) -> Outcome:
    """Align as the recipe says, from recipe.base. Otherwise as `pretrain`.

    Raises KLAlarmError, a TrainingError, where the policy leaves the reference behind; its last good checkpoint stays.
    """
    if recipe.loop.shard:
        raise InputError("a policy that answers is whole on each process: it cannot be aligned with loop.shard=true")
    recipe = override(recipe, "loop.shard", False)
    prepare = partial(prepare_policy, run=run, runtime=runtime, console=console)
    if recipe.alignment.method in ("dpo", "ipo"):
        prepare = partial(prepare_pairs, run=run, runtime=runtime, console=console)
    try:
        return run_stage(recipe, run, runtime, console, prepare, resume=resume, wandb=wandb)
    except KLAlarmError as alarm:
        if runtime.processes.main:
            set_aside_newer(run.checkpoints, alarm.good)
        raise


def prepare_pairs(recipe: Recipe, run: Run, runtime: Runtime, console: Console) -> Stage:
    require_room_for_pairs(recipe)
    base = load_base(recipe, run)
    tokenizer, context = Tokenizer.load(run.tokenizer), recipe.model.context
    train, validation, batches = read_pairs(recipe, tokenizer, runtime, console)
    reference = load_reference(recipe, runtime)
    dpo = DPO(recipe.alignment, reference, tokenizer)
    # Their program tells more than their likelihood, where the base has learnt from the built-in requests.
    data = prompts_of(Run(Path(str(recipe.base))).read_recipe())
    asked = open_conversations(data) if data else None
    if isinstance(asked, StoryRequests):
        prompts = encode_prompts(asked, "validation", tokenizer, context, HELD_OUT).first(HELD_OUT)
    else:
        prompts = [Prompt(tuple(validation.prompt(number))) for number in range(min(HELD_OUT, len(validation)))]
    watch = watch_over(recipe, reference, prompts, gold_reward(prompts, tokenizer), tokenizer, console)

    def evaluate(policy: GPT, tokens: int, tokens_per_batch: int) -> dict[str, float]:
        return {**watch(policy), **dpo.evaluate(validation, policy, tokens, tokens_per_batch)}

    return Stage(
        recipe,
        batches,
        evaluate=evaluate,
        sample=partial(show_answers, tokenizer=tokenizer, prompts=prompts[: recipe.loop.samples]),
        amounts=amounts_of_pairs(train, validation),
        base=base,
        loss=dpo.loss,
        metrics=dpo.measures,
        notes=(*train.describe_beside(validation), *begin_notes(recipe, watch)),
    )


def prepare_policy(recipe: Recipe, run: Run, runtime: Runtime, console: Console) -> Stage:
    config, base = recipe.alignment, load_base(recipe, run)
    if config.reward_weights not in (None, weights_of(config.reward)):
        raise InputError(
            f"{config.reward} has other weights than the reward model that {run.path} began with: bring these back, or "
            "start a new run"
        )
    tokenizer = Tokenizer.load(run.tokenizer)
    source = open_prompts(recipe.data)
    console.say(source.describe())
    group = config.group if config.method == "grpo" else 1
    rounds = -(-(recipe.budget.steps or 1) * recipe.loop.batch // (config.answers * config.passes))
    needed = {"train": rounds * config.answers // group, "validation": HELD_OUT}
    train, held_out = (
        encode_prompts(source, split, tokenizer, recipe.model.context, most) for split, most in needed.items()
    )
    prompts = held_out.first(HELD_OUT)
    reference = load_reference(recipe, runtime)
    gold = gold_reward(prompts, tokenizer)
    rewards = {"reward": open_reward(config.reward, tokenizer, runtime, bool(gold)), **gold}
    ppo = PPO(config, begin_critic(recipe, base, runtime), recipe.tokens_per_pass) if config.method == "ppo" else None
    rollouts = Rollouts(
        recipe, train, reference, rewards, ppo or GRPO(config), answer_ends(tokenizer), runtime.processes
    )
    watch = watch_over(recipe, reference, prompts, rewards, tokenizer, console)

    def begin(config: ModelConfig) -> GPT:
        rollouts.policy = GPT(config)
        return rollouts.policy

    def evaluate(policy: GPT, tokens: int, tokens_per_batch: int) -> dict[str, float]:
        """ "loss" is what the policy minimises: beta * KL less the reward."""
        measured = watch(policy)
        return {"loss": config.beta * measured["kl"] - measured["reward"], **measured}

    return Stage(
        recipe,
        rollouts,
        evaluate=evaluate,
        sample=partial(show_answers, tokenizer=tokenizer, prompts=prompts[: recipe.loop.samples]),
        amounts=Amounts(
            f"{len(train):,} prompts to train on, {len(held_out):,} prompts to validate",
            lambda steps, epochs: f"{steps / rollouts.steps_per_round:g} rounds of {config.answers} answers",
            f"{recipe.loop.batch} answers a step"
            + (f", {recipe.loop.micro_batch} at a time" if recipe.loop.micro_batch else ""),
        ),
        model=begin,
        base=base,
        loss=rollouts.method.loss,
        metrics=rollouts.method.measures,
        critic=ppo.critic if ppo else None,
        notes=(
            *train.describe_beside(held_out),
            f"rollouts   {config.answers} answers, each learnt {config.passes} times; reward: {config.reward}",
            *begin_notes(recipe, watch),
        ),
    )


def weights_of(reward: str) -> str | None:
    """What a reward model is known by; None of the program."""
    return None if reward == PROGRAM else Run(Path(reward)).find_checkpoint().checksum("model")


def begin_critic(recipe: Recipe, base: Checkpoint, runtime: Runtime) -> RewardModel:
    """PPO's critic as it begins: a copy of a reward model with a head, else the policy's body under a head of zeros."""
    reward = Run(Path(recipe.alignment.reward))
    if recipe.alignment.reward != PROGRAM and not reward.read_recipe().reward.implicit:
        return RewardModel.load(reward, runtime)
    critic = RewardModel(dataclasses.replace(recipe.model, scalar_head=True))
    critic.take_backbone(base.tensors("model"))
    # Expecting nothing is wiser than expecting anything.
    critic.head.weight.data.zero_()
    critic.compute_dtype = runtime.dtype
    return critic.to(runtime.device)


def load_reference(recipe: Recipe, runtime: Runtime) -> GPT:
    """The model that the policy begins as, frozen."""
    return load_frozen(Run(Path(str(recipe.base))), runtime, str(recipe.base_step), recipe.model.context)


def check_reward(recipe: Recipe) -> None:
    """Raises InputError where the recipe's reward cannot be asked about its data."""
    if recipe.alignment.method in ("ppo", "grpo"):
        tokenizer = Tokenizer.load(Run(Path(str(recipe.base))).tokenizer)
        facts = isinstance(open_prompts(recipe.data), StoryRequests)
        open_reward(recipe.alignment.reward, tokenizer, choose("cpu", "fp32"), facts)


def gold_reward(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> dict[str, Reward]:
    """The reward called "gold", the program's, where the prompts have facts for it."""
    return {"gold": ProgramReward(tokenizer)} if prompts[0].facts else {}


def watch_over(
    recipe: Recipe,
    reference: GPT,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    tokenizer: Tokenizer,
    console: Console,
) -> Watch:
    measure = partial(
        measure_policy,
        reference=reference,
        prompts=prompts,
        rewards=rewards,
        ends=answer_ends(tokenizer),
        temperature=recipe.alignment.temperature,
        max_tokens=recipe.alignment.max_tokens,
        tokens_per_pass=recipe.tokens_per_pass,
    )
    return Watch(measure, reference, console.say)


def begin_notes(recipe: Recipe, watch: Watch) -> tuple[str, str]:
    return (
        f"reference  {recipe.base}, step {recipe.base_step}",
        f"begins at  {'  '.join(measure_parts(watch.begin))}, on held-out prompts",
    )


def show_answers(model: GPT, *, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[str]:
    answers = roll_out(model, prompts, answer_ends(tokenizer)).answers
    return [
        f"> {tokenizer.decode(prompt.ids)}\n\n{tokenizer.decode(answer)}"
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
