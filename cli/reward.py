"""gpt reward"""

from pathlib import Path
from typing import Annotated

import typer

from cli import training
from cli.options import (
    CheckpointName,
    ChosenColumn,
    Device,
    Precision,
    PromptColumn,
    RejectedColumn,
    RunArgument,
)
from engine.errors import InputError


def reward(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Folder of the new run; RUN-reward unless given.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Preferences: stories-preferences (unless told else), hh-rlhf, ultrafeedback_binarized, a Hub data "
            "set owner/name or a file, with columns chosen and rejected, and prompt where these do not hold it."
        ),
    ] = None,
    prompt_column: PromptColumn = None,
    chosen_column: ChosenColumn = None,
    rejected_column: RejectedColumn = None,
    steps: training.Steps = None,
    tokens: training.Tokens = None,
    epochs: training.Epochs = None,
    minutes: training.Minutes = None,
    batch: training.Batch = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate at its highest; 5e-4, or 1e-4 if implicit.")] = None,
    implicit: Annotated[
        bool, typer.Option("--implicit", help="Score by how much likelier an answer has become, instead of by a head.")
    ] = False,
    margin: Annotated[float | None, typer.Option(help="By how much the chosen answer has to win.")] = None,
    checkpoint: CheckpointName = "latest",
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of the head and the order of the data.")] = None,
    setting: training.Setting = None,
    resume: training.Resume = False,
    overwrite: training.Overwrite = False,
    wandb: training.WandB = False,
    gpus: training.Gpus = None,
    shard: training.Shard = False,
    nodes: training.Nodes = None,
    rendezvous: training.Rendezvous = None,
) -> None:
    """Train a reward model, which scores answers as people would, from a chat model. One epoch unless told else.

    Example: gpt reward runs/nano-chat

    Example: gpt reward runs/tiny-chat --data ultrafeedback_binarized --set model.context=1024 --minutes 30

    Its rewards are scaled such that the chat model's own answers have mean 0 and standard deviation 1.
    """
    training.distribute(gpus, nodes, rendezvous)
    from engine.config import DataConfig
    from engine.run import Run
    from rlhf.preferences import STORIES_PREFERENCES
    from rlhf.reward_model import reward_recipe, train_reward

    target = Run(out or run.with_name(f"{run.name}-reward"))
    if resume:
        columns = (prompt_column, chosen_column, rejected_column)
        changes = (data, *columns, batch, rate, implicit, margin, checkpoint, seed, setting, overwrite, precision)
        training.refuse_changes(*changes)
        recipe = training.resumed(target, run, training.REWARD_MODEL)
    else:
        config = DataConfig(
            source=training.located(data or STORIES_PREFERENCES),
            prompt_column=prompt_column,
            chosen_column=chosen_column,
            rejected_column=rejected_column,
        )
        recipe = reward_recipe(Run(run), Run(run).find_checkpoint(checkpoint), config, rate, implicit=implicit)
        if target.path.resolve() == run.resolve():
            raise InputError(f"{run} cannot become its own reward model; choose another folder with --out")
    recipe = training.adjust(
        recipe,
        {"steps": steps, "tokens": tokens, "epochs": epochs, "minutes": minutes},
        {
            "loop.batch": batch,
            "loop.seed": seed,
            "reward.margin": margin,
            "precision": precision,
            "loop.shard": shard or None,
        },
        setting,
    )
    typer.echo(f"{target.path} learns to score what {run} may say")
    command = f"gpt reward {run}"
    training.start(train_reward, recipe, target, device, command, resume=resume, overwrite=overwrite, wandb=wandb)
