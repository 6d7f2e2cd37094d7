"""Alignment runs: a chat model goes on learning, from rewards or from preferences, in the one training loop.

    recipe -> what is prepared -> Stage -> the loop

ppo, grpo   batches are rounds of the policy's own answers, scored by a reward   RolloutLoader
            a method turns scores into advantages, and has a loss                PPO (with a critic), GRPO
dpo, ipo    batches are pairs of answers, of which one was preferred             PairLoader
            there is only a loss                                                 DPO

All of them begin as a finetuned model, the reference, and are measured beside it on held-out prompts (PolicyMonitor).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from engine.chat_template import answer_ends
from engine.checkpoint import Checkpoint, set_aside_newer
from engine.config import AlignmentConfig, BudgetConfig, DataConfig, ModelConfig, Recipe, ScheduleConfig, override
from engine.errors import InputError
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime, choose
from engine.tokenizer import Tokenizer
from rlhf.methods import DPO, GRPO, PPO, begin_critic
from rlhf.policy_metrics import PolicyMonitor
from rlhf.preferences import Pairs, open_preferences, read_pairs
from rlhf.prompts import Prompt, encode_prompts, open_prompts, prompts_of
from rlhf.reward_model import feedback_recipe, load_reference, open_reward, open_rewards, weights_of
from rlhf.rollout_loader import KLAlarmError, Method, RolloutLoader
from train.data.sources import StoryRequests, open_conversations
from train.finetune import load_base
from train.stage import Amounts, Outcome, Stage
from train.tracking import Console
from train.trainer import run_stage

# Learning rates that worked on a nano model.
RATES = {"ppo": 3e-5, "grpo": 5e-5, "dpo": 3e-5, "ipo": 3e-5}
ON_POLICY = ("ppo", "grpo")
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
    """Return the recipe that aligns a chat run: AdamW at a rate that falls to 0, over `rounds` or an epoch of pairs.

    `batch` is the number of answers in a step of PPO or GRPO; of DPO and IPO it is the number of sequences, each as
    long as the context, which packed pairs fill. Raises InputError if the run is no chat model, or if `data` names
    nothing.
    """
    recipe = feedback_recipe(base, checkpoint, data, rate, usual=RATES[alignment.method])
    loop = dataclasses.replace(recipe.loop, batch=batch, micro_batch=None, compile=False)
    if alignment.method not in ON_POLICY:
        open_preferences(data)
        budget, schedule = BudgetConfig(epochs=1), ScheduleConfig(shape="wsd", warmup=0.05, decay=0.95)
    else:
        open_prompts(data)
        alignment = dataclasses.replace(alignment, reward_weights=weights_of(alignment.reward))
        round_steps = max(1, alignment.answers * alignment.passes // batch)
        budget = BudgetConfig(steps=rounds * round_steps)
        schedule = ScheduleConfig(shape="wsd", warmup=0.0, decay=1.0)
        # A checkpoint is saved after each round. Only the KL of the next round shows whether it is good, so the one
        # before it must still be there: at least two are kept.
        every, keep = round_steps * max(1, rounds // 10), max(2, loop.keep)
        loop = dataclasses.replace(loop, log_every=1, save_every=round_steps, evaluate_every=every, keep=keep)
    return dataclasses.replace(recipe, alignment=alignment, budget=budget, schedule=schedule, loop=loop)


def align(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, *, resume: bool = False, wandb: bool = False
) -> Outcome:
    """Align as the recipe says, from recipe.base. Otherwise as `pretrain`.

    Raises KLAlarmError, a TrainingError, where the policy leaves the reference behind; its last good checkpoint stays.
    """
    # The setting is true, false, or None, which lets the loop decide by memory. A policy that draws answers cannot be
    # sharded: true is refused, and None becomes false.
    if recipe.loop.shard:
        raise InputError("a policy that answers is whole on each process: it cannot be aligned with loop.shard=true")
    recipe = override(recipe, "loop.shard", False)
    prepare = prepare_rollouts if recipe.alignment.method in ON_POLICY else prepare_pairs
    prepare = partial(prepare, run=run, runtime=runtime, console=console)
    try:
        return run_stage(recipe, run, runtime, console, prepare, resume=resume, wandb=wandb)
    except KLAlarmError as alarm:
        if runtime.processes.main:
            set_aside_newer(run.checkpoints, alarm.good)
        raise


def prepare_rollouts(recipe: Recipe, run: Run, runtime: Runtime, console: Console) -> Stage:
    """Prepare the stage of PPO or GRPO: prompts, a reward, and rounds of answers that the policy draws."""
    config, base, tokenizer = recipe.alignment, load_base(recipe, run), Tokenizer.load(run.tokenizer)
    if config.reward_weights not in (None, weights_of(config.reward)):
        raise InputError(
            f"{config.reward} has other weights than the reward model that {run.path} began with: bring these back, or "
            "start a new run"
        )
    source = open_prompts(recipe.data)
    console.say(source.describe())
    # A round has answers * passes / batch steps, so this is the number of rounds, rounded up. Each of them needs new
    # prompts, and GRPO draws `group` answers to each prompt. More prompts need not be read.
    rounds = -(-(recipe.budget.steps or 1) * recipe.loop.batch // (config.answers * config.passes))
    asked = rounds * config.answers // (config.group if config.method == "grpo" else 1)
    train, held_out = (
        encode_prompts(source, split, tokenizer, recipe.model.context, most)
        for split, most in {"train": asked, "validation": HELD_OUT}.items()
    )
    prompts, reference = held_out.first(HELD_OUT), load_reference(recipe, runtime)
    rewards = open_rewards(config.reward, prompts, tokenizer, runtime)
    method: Method = GRPO(config)
    if config.method == "ppo":
        method = PPO(config, begin_critic(recipe, base, reference, runtime), recipe.tokens_per_pass)
    ends = answer_ends(tokenizer)
    rollouts = RolloutLoader(recipe, train, reference, rewards, method, ends, runtime.processes)
    monitor = PolicyMonitor(recipe, reference, prompts, rewards, tokenizer, console.say)

    def begin(config: ModelConfig) -> GPT:
        """Make the model that is trained, and let the loader draw answers from that same model."""
        rollouts.policy = begin_policy(recipe, config, reference)
        return rollouts.policy

    def evaluate(policy: GPT, tokens: int, tokens_per_batch: int) -> dict[str, float]:
        """Measure the policy; "loss" is what it minimises: beta * KL less the reward."""
        metrics = monitor(policy)
        return {"loss": config.beta * metrics["kl"] - metrics["reward"], **metrics}

    at_a_time = f", {recipe.loop.micro_batch} at a time" if recipe.loop.micro_batch else ""
    return Stage(
        recipe,
        rollouts,
        evaluate=evaluate,
        sample=monitor.sample,
        amounts=Amounts(
            f"{len(train):,} prompts to train on, {len(held_out):,} prompts to validate",
            lambda steps, epochs: f"{steps / rollouts.steps_per_round:g} rounds of {config.answers} answers",
            f"{recipe.loop.batch} answers a step{at_a_time}",
        ),
        model=begin,
        base=base,
        loss=method.loss,
        metrics=method.metrics,
        critic=method.critic,
        notes=(
            *train.describe_beside(held_out),
            f"rollouts   {config.answers} answers, each learnt {config.passes} times; reward: {config.reward}",
            *monitor.notes(),
        ),
    )


def prepare_pairs(recipe: Recipe, run: Run, runtime: Runtime, console: Console) -> Stage:
    """Prepare the stage of DPO or IPO: pairs of answers, and a loss that compares the policy with the reference."""
    base, tokenizer = load_base(recipe, run), Tokenizer.load(run.tokenizer)
    train, validation, batches = read_pairs(recipe, tokenizer, runtime, console)
    reference = load_reference(recipe, runtime)
    dpo = DPO(recipe.alignment, reference, tokenizer)
    prompts = prompts_to_measure(recipe, tokenizer, validation)
    rewards = open_rewards(None, prompts, tokenizer, runtime)
    monitor = PolicyMonitor(recipe, reference, prompts, rewards, tokenizer, console.say)

    def evaluate(policy: GPT, tokens: int, tokens_per_batch: int) -> dict[str, float]:
        return {**monitor(policy), **dpo.evaluate(validation, policy, tokens, tokens_per_batch)}

    return Stage(
        recipe,
        batches,
        evaluate=evaluate,
        sample=monitor.sample,
        amounts=train.amounts(validation),
        model=lambda config: begin_policy(recipe, config, reference),
        base=base,
        loss=dpo.loss,
        metrics=dpo.metrics,
        notes=(*train.describe_beside(validation), *monitor.notes()),
    )


def begin_policy(recipe: Recipe, config: ModelConfig, reference: GPT) -> GPT:
    """Make the model that is trained. Where adapters learn, its weights are the reference's: there is no copy."""
    policy = GPT(config)
    if recipe.lora.rank:
        policy.load_state_dict(reference.state_dict(), assign=True)
    return policy


def prompts_to_measure(recipe: Recipe, tokenizer: Tokenizer, held_out: Pairs) -> Sequence[Prompt]:
    """Return the held-out prompts on which the policy is evaluated.

    If the base was finetuned on requests for stories, these are such requests: the program itself can score the
    answers, and its score says more than a likelihood. Else they are the prompts of the held-out pairs.
    """
    data = prompts_of(Run(Path(str(recipe.base))).read_recipe())
    source = open_conversations(data) if data else None
    if isinstance(source, StoryRequests):
        return encode_prompts(source, "validation", tokenizer, recipe.model.context, HELD_OUT).first(HELD_OUT)
    return [Prompt(tuple(held_out.prompt(number))) for number in range(min(HELD_OUT, len(held_out)))]


def check_reward(recipe: Recipe) -> None:
    """Raise InputError where the recipe's reward cannot be asked about its data."""
    if recipe.alignment.method in ON_POLICY:
        tokenizer = Tokenizer.load(Run(Path(str(recipe.base))).tokenizer)
        facts = isinstance(open_prompts(recipe.data), StoryRequests)
        open_reward(recipe.alignment.reward, tokenizer, choose("cpu", "fp32"), facts)
