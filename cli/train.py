"""gpt train"""

from pathlib import Path
from typing import Annotated

import typer

from cli import training
from cli.options import Column, Device, Precision
from engine.errors import InputError

Preset = Annotated[
    str | None, typer.Argument(help="nano (1.8M parameters), tiny (24M) or large (360M).", show_default=False)
]


def train(
    preset: Preset = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/PRESET unless given.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="stories, tinystories, dsir-pile, a Hub data set owner/name, a file, folder or glob, or prepared data."
        ),
    ] = None,
    column: Column = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read and tokenize while training, instead of preparing all data first.")
    ] = False,
    steps: training.Steps = None,
    tokens: training.Tokens = None,
    epochs: training.Epochs = None,
    minutes: training.Minutes = None,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order of the data.")] = None,
    setting: training.Setting = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="First check every byte of prepared data against its checksum.")
    ] = False,
    resume: training.Resume = False,
    overwrite: training.Overwrite = False,
    wandb: training.WandB = False,
    gpus: training.Gpus = None,
    shard: training.Shard = False,
    nodes: training.Nodes = None,
    rendezvous: training.Rendezvous = None,
) -> None:
    """Train a model from text.

    Example: gpt train nano --minutes 3

    Example: gpt train tiny --data 'stories/*.jsonl' --epochs 2 --set model.blocks=8

    Ctrl-C finishes the step and saves; the same command with --resume goes on from there.
    """
    training.distribute(gpus, nodes, rendezvous)
    from engine import config
    from engine.run import Run
    from train.data.shards import TokenShards, is_prepared
    from train.data.sources import open_source
    from train.pretrain import SPLITS_USED, pretrain

    if preset is None and not (resume and out):
        raise InputError("name a preset: gpt train nano, gpt train tiny or gpt train large")
    run = Run(out or Path("runs") / str(preset))
    if resume:
        training.refuse_changes(data, column, stream, seed, setting, overwrite, precision)
    recipe = training.resumed(run, None, training.PRETRAINED) if resume else config.preset(str(preset))
    if preset not in (None, recipe.name):
        raise InputError(
            f"{run.path} is a run of {recipe.name}, not of {preset}: go on with it by "
            f"{training.go_on_with(run, recipe)}, or leave --resume and choose another --out"
        )
    if data is not None:
        recipe = config.override(recipe, "data.source", training.located(data))
        # Asked for by name, nothing else will do.
        recipe = config.override(recipe, "data.fallback", None)
    recipe = training.adjust(
        recipe,
        {"steps": steps, "tokens": tokens, "epochs": epochs, "minutes": minutes},
        {
            "data.column": column,
            "data.stream": stream or None,
            "loop.seed": seed,
            "loop.shard": shard or None,
            "precision": precision,
        },
        setting,
    )

    if verify:
        folder = next((each for each in (Path(recipe.data.source), run.data) if is_prepared(each)), None)
        if folder is None:
            raise InputError(f"--verify checks prepared data, and {recipe.data.source} is not: gpt data prepare --help")
        for split in SPLITS_USED:
            TokenShards.open(folder, split).verify()
            typer.echo(f"{folder}, {split}: every checksum right")

    def check() -> None:
        if not is_prepared(recipe.data.source):
            open_source(recipe.data.source, column=recipe.data.column, limit=recipe.data.documents)

    command = f"gpt train {recipe.name}"
    training.start(pretrain, recipe, run, device, command, check=check, resume=resume, overwrite=overwrite, wandb=wandb)
