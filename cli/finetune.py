"""gpt finetune"""

from pathlib import Path
from typing import Annotated

import typer

from cli import training
from cli.options import (
    CheckpointName,
    Column,
    Device,
    MessagesColumn,
    Precision,
    PromptColumn,
    ResponseColumn,
    RunArgument,
)
from engine.errors import InputError


def finetune(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Folder of the new run; RUN-chat or RUN-tuned unless given.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Conversations: stories-instruct (unless told else), stories-instruct:brief, dolly, alpaca, oasst1, "
            "smoltalk, smol-smoltalk, ultrafeedback, tinystories-instruct, a Hub data set owner/name or a file. "
            "Or documents, as for gpt train."
        ),
    ] = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    messages_column: MessagesColumn = None,
    column: Column = None,
    steps: training.Steps = None,
    tokens: training.Tokens = None,
    epochs: training.Epochs = None,
    minutes: training.Minutes = None,
    batch: training.Batch = None,
    rate: Annotated[float | None, typer.Option(help="Learning rates, as a share of pretraining's.")] = None,
    checkpoint: CheckpointName = "latest",
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of the order of the data.")] = None,
    setting: training.Setting = None,
    resume: training.Resume = False,
    overwrite: training.Overwrite = False,
    wandb: training.WandB = False,
    gpus: training.Gpus = None,
    shard: training.Shard = False,
    nodes: training.Nodes = None,
    rendezvous: training.Rendezvous = None,
) -> None:
    """Finetune a run: to a chat model with conversations, or to other text with documents. One epoch unless told else.

    Example: gpt finetune runs/nano

    Example: gpt finetune runs/tiny --data dolly --epochs 3 --out runs/tiny-dolly

    Example: gpt finetune runs/tiny --data chats.jsonl --prompt-column ask --response-column reply
    """
    training.distribute(gpus, nodes, rendezvous)
    from engine.config import DataConfig
    from engine.run import Run
    from train.data.sources import STORIES_INSTRUCT
    from train.finetune import finetune, finetuning_recipe

    if resume:
        columns = (column, prompt_column, response_column, messages_column)
        training.refuse_changes(data, *columns, batch, rate, checkpoint, seed, setting, overwrite, precision)
        target = Run(out or run.with_name(f"{run.name}-chat"))
        recipe = training.resumed(target, run, training.FINETUNED)
    else:
        config = DataConfig(
            source=training.located(data or STORIES_INSTRUCT),
            column=column,
            prompt_column=prompt_column,
            response_column=response_column,
            messages_column=messages_column,
        )
        recipe = finetuning_recipe(Run(run), Run(run).find_checkpoint(checkpoint), config, rate)
        target = Run(out or run.with_name(f"{run.name}-{'chat' if recipe.chat else 'tuned'}"))
        if target.path.resolve() == run.resolve():
            raise InputError(f"{run} cannot be finetuned into itself; choose another folder with --out")
    recipe = training.adjust(
        recipe,
        {"steps": steps, "tokens": tokens, "epochs": epochs, "minutes": minutes},
        {"loop.batch": batch, "loop.seed": seed, "precision": precision, "loop.shard": shard or None},
        setting,
    )
    typer.echo(f"{run} is finetuned into {target.path}")
    command = f"gpt finetune {run}"
    training.start(finetune, recipe, target, device, command, resume=resume, overwrite=overwrite, wandb=wandb)
