"""gpt train, finetune, reward, and rlhf ppo, grpo and dpo: all that changes weights."""

import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from cli import options, rlhf_answers, sizing, training
from cli.launch import rank_here
from cli.options import ON_RESUME, Few, RunArgument, folder
from engine import config
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.config import Recipe
    from engine.planning import Machine, Rate
    from engine.run import Run

PRESET = "nano (1.8M parameters), tiny (24M) or large (360M); or none, with --depth, --params or a time."
TEXT = "stories, tinystories, dsir-pile, a Hub data set owner/name, a file, folder or glob, or prepared data."
CONVERSATIONS = (
    "Conversations: stories-instruct (by default), stories-instruct:brief, stories-instruct:chat, dolly, alpaca, "
    "oasst1, smoltalk, smol-smoltalk, ultrafeedback, tinystories-instruct, a Hub data set owner/name or a file. Or "
    "documents, as for gpt train."
)
PREFERENCES = (
    "Preferences: stories-preferences (by default), hh-rlhf, ultrafeedback_binarized, a Hub data set owner/name "
    "or a file, such as `gpt rlhf pairs` writes: columns chosen and rejected, and prompt where these do not hold it."
)


@dataclass(frozen=True)
class TrainOptions(options.Size, options.Length, options.Sharding, options.TrainingOptions):
    out: Annotated[Path | None, folder("runs/PRESET, or such as runs/depth-6,"), ON_RESUME] = None
    data: Annotated[str | None, Option(help=TEXT)] = None
    column: options.Column = None
    stream: Annotated[bool, Option("--stream", help="Tokenize while training, not before."), "data.stream"] = False
    verify: Annotated[bool, Option("--verify", help="First check prepared data, every byte."), ON_RESUME] = False


def train(asked: TrainOptions, preset: Annotated[str | None, Argument(help=PRESET, show_default=False)] = None) -> None:
    """Train a model from text.

    Example: gpt train nano --minutes 3

    Example: gpt train --depth 6 --data stories.txt

    Example: gpt train tiny --data 'stories/*.jsonl' --epochs 2 --set model.blocks=8

    Ctrl-C finishes the step and saves; the same command with --resume goes on from there.
    """
    training.distribute(asked)
    from engine.run import Run
    from train.data.shards import TokenShards, is_prepared
    from train.data.sources import open_source
    from train.pretrain import SPLITS_USED, pretrain

    asked = dataclasses.replace(asked, minutes=asked.length(asked.minutes), hours=None)
    name = preset or ""
    if not (asked.resume and asked.out):
        name = sizing.name_of(preset, asked, asked.minutes)
    run = Run(asked.out or Path("runs") / name)

    def adjust(recipe: "Recipe") -> "Recipe":
        if asked.data is not None and not asked.resume:
            recipe = config.override(recipe, "data.source", training.located(asked.data))
            # Where data was asked for by name, nothing else will do.
            recipe = config.override(recipe, "data.fallback", None)
        return training.adjust(recipe, options.given_settings(asked), None if asked.resume else asked.setting)

    if asked.resume:
        recipe = training.resumed(run, training.PRETRAINED, asked)
        if preset not in (None, recipe.name):
            raise InputError(
                f"{run.path} is a run of {recipe.name}, not of {preset}: go on with it by "
                f"{training.kind_and_command(run, recipe)[1]}, or leave --resume and choose another --out"
            )
        recipe = adjust(recipe)
    elif preset is not None:
        recipe = adjust(config.preset(preset))
    else:
        rank, processes = rank_here(), int(os.environ.get("WORLD_SIZE", "1"))

        def machine(known: "Recipe") -> "tuple[Machine, Rate, str]":
            return sizing.this_machine(asked.choose(), config.override(known, "precision", asked.precision))

        learnt = sizing.learning_on(machine, processes)
        recipe, reasons = sizing.derive(name, asked, asked.minutes, learnt, adjust, processes)
        for line in reasons if not rank else ():
            typer.echo(line)

    if asked.verify:
        prepared = next((each for each in (Path(recipe.data.source), run.data) if is_prepared(each)), None)
        if prepared is None:
            raise InputError(f"--verify checks prepared data, and {recipe.data.source} is not: gpt data prepare --help")
        for split in SPLITS_USED:
            TokenShards(prepared, split).verify()
            typer.echo(f"{prepared}, {split}: every checksum right")

    def check() -> None:
        if not is_prepared(recipe.data.source):
            open_source(recipe.data.source, column=recipe.data.column, limit=recipe.data.documents)

    training.start(pretrain, recipe, run, asked, check=check)


@dataclass(frozen=True)
class FinetuneOptions(options.ConversationColumns, options.Length, options.Sharding, options.DerivedOptions):
    out: Annotated[Path | None, folder("RUN-chat or RUN-tuned"), ON_RESUME] = None
    data: Annotated[str | None, Option(help=CONVERSATIONS)] = None
    batch: options.Batch = None
    rate: Annotated[config.Weight | None, Option(help="Learning rates, as a share of pretraining's.")] = None


def finetune(run: RunArgument, asked: FinetuneOptions) -> None:
    """Finetune a run: to a chat model with conversations, or to other text with documents. One epoch by default.

    Example: gpt finetune runs/nano

    Example: gpt finetune runs/tiny --data dolly --epochs 3 --out runs/tiny-dolly

    Example: gpt finetune runs/tiny --data chats.jsonl --prompt-column ask --response-column reply
    """
    training.distribute(asked)
    from train.data.sources import STORIES_INSTRUCT
    from train.finetune import finetune, finetuning_recipe

    make = partial(finetuning_recipe, data=training.data_config(asked, STORIES_INSTRUCT), rate=asked.rate)
    recipe, target = training.begin_with(run, "chat", asked, training.FINETUNED, make)
    typer.echo(f"{run} is finetuned into {target.path}")
    training.start(finetune, recipe, target, asked, run)


@dataclass(frozen=True)
class RewardOptions(options.PreferenceColumns, options.Length, options.Sharding, options.DerivedOptions):
    out: Annotated[Path | None, folder("RUN-reward"), ON_RESUME] = None
    data: Annotated[str | None, Option(help=PREFERENCES)] = None
    batch: options.Batch = None
    rate: Annotated[config.Weight | None, Option(help="Learning rate at its highest; 5e-4, or 1e-4 if implicit.")] = (
        None
    )
    implicit: Annotated[bool, Option("--implicit", help="Score by how much likelier an answer has become.")] = False
    margin: Annotated[float | None, Option(help="By how much the chosen answer has to win."), "reward.margin"] = None


def reward(run: RunArgument, asked: RewardOptions) -> None:
    """Train a reward model, which scores answers as people would, from a chat model. One epoch by default.

    Example: gpt reward runs/nano-chat

    Example: gpt reward runs/tiny-chat --data ultrafeedback_binarized --set model.context=1024 --minutes 30

    Its rewards are scaled such that the chat model's own answers have mean 0 and standard deviation 1.
    """
    training.distribute(asked)
    from rlhf.preferences import STORIES_PREFERENCES
    from rlhf.reward_model import reward_recipe, train_reward

    data = training.data_config(asked, STORIES_PREFERENCES)
    make = partial(reward_recipe, data=data, rate=asked.rate, implicit=asked.implicit)
    recipe, target = training.begin_with(run, "reward", asked, training.REWARD_MODEL, make)
    typer.echo(f"{target.path} learns to score what {run} may say")
    training.start(train_reward, recipe, target, asked, run)


@dataclass(frozen=True)
class AlignmentOptions(options.DerivedOptions):
    beta: Annotated[float | None, Option(help="The price of KL: higher stays closer to RUN."), "alignment.beta"] = None
    rate: Annotated[config.Weight | None, Option(help="Learning rate at the start; it falls to 0.")] = None


@dataclass(frozen=True)
class OnPolicyOptions(AlignmentOptions):
    reward: rlhf_answers.Reward = None
    data: rlhf_answers.Prompts = None
    prompt_column: options.PromptColumn = None
    rounds: Annotated[Few | None, Option(help="Rollouts of alignment.answers answers; 40 unless given.")] = None
    batch: Annotated[Few | None, Option(help="Answers in a step; 32 unless given.")] = None


@dataclass(frozen=True)
class PPOOptions(OnPolicyOptions):
    out: Annotated[Path | None, folder("RUN-ppo"), ON_RESUME] = None
    kl_target: Annotated[float | None, Option(help="Steer beta to this KL, in nats."), "alignment.kl_target"] = None


def ppo(run: RunArgument, asked: PPOOptions) -> None:
    """Proximal policy optimisation: answers are drawn and scored, a critic says which token earned what.

    Example: gpt rlhf ppo runs/nano-chat --reward runs/nano-chat-reward

    Example: gpt rlhf ppo runs/nano-chat --reward program --rounds 20 --set alignment.answers=64
    """
    _align("ppo", run, asked)


@dataclass(frozen=True)
class GRPOOptions(OnPolicyOptions):
    out: Annotated[Path | None, folder("RUN-grpo"), ON_RESUME] = None
    group: Annotated[int | None, Option(help="Answers to each prompt; 8 unless given."), "alignment.group"] = None


def grpo(run: RunArgument, asked: GRPOOptions) -> None:
    """Group relative policy optimisation: answers to the same prompt are compared with one another, without a critic.

    Example: gpt rlhf grpo runs/nano-chat --reward runs/nano-chat-reward
    """
    _align("grpo", run, asked)


@dataclass(frozen=True)
class DPOOptions(options.PreferenceColumns, options.Length, AlignmentOptions):
    out: Annotated[Path | None, folder("RUN-dpo, or RUN-ipo,"), ON_RESUME] = None
    data: Annotated[str | None, Option(help=PREFERENCES)] = None
    batch: options.Batch = None
    ipo: Annotated[bool, Option("--ipo", help="Use IPO's loss, which does not overfit to sure pairs."), ON_RESUME] = (
        False
    )
    label_smoothing: Annotated[
        float | None, Option(help="The share of preferences that may be wrong."), "alignment.label_smoothing"
    ] = None


def dpo(run: RunArgument, asked: DPOOptions) -> None:
    """Direct preference optimisation: from pairs of answers, without a reward model. One epoch by default.

    Example: gpt rlhf dpo runs/nano-chat --data runs/nano-chat/pairs.jsonl

    Example: gpt rlhf dpo runs/tiny-chat --data ultrafeedback_binarized --set model.context=1024 --ipo
    """
    _align("ipo" if asked.ipo else "dpo", run, asked)


def _align(method: Any, run: Path, asked: OnPolicyOptions | DPOOptions) -> None:
    training.distribute(asked)
    from engine.config import AlignmentConfig
    from rlhf.align import align, alignment_recipe, check_reward
    from rlhf.preferences import STORIES_PREFERENCES

    def make(base: "Run", checkpoint: "Checkpoint") -> "Recipe":
        # These settings decide how many steps make a round, so they come before the rest of the recipe.
        alignment = AlignmentConfig(method=method)
        sizes = {}
        if isinstance(asked, OnPolicyOptions):
            alignment = dataclasses.replace(alignment, reward=rlhf_answers.named_reward(run, asked.reward))
            data = rlhf_answers.prompt_data(base, asked)
            sizes = {name: value for name in ("rounds", "batch") if (value := getattr(asked, name)) is not None}
        else:
            data = training.data_config(asked, STORIES_PREFERENCES)
        alignment = training.adjust_group(alignment, "alignment.", options.given_settings(asked), asked.setting)
        return alignment_recipe(base, checkpoint, data, alignment, rate=asked.rate, **sizes)

    recipe, target = training.begin_with(run, method, asked, f"a run of {method}", make)
    typer.echo(f"{run} is aligned into {target.path} by {method}")
    training.start(align, recipe, target, asked, run, lambda: check_reward(recipe))
