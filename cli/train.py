"""gpt train"""

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Column, Device, Precision
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.config import Recipe
    from engine.run import Run

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
    steps: Annotated[int | None, typer.Option(help="Train for so many steps.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Train on so many tokens, such as 5e6.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Read the data so many times.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Train for so long; the schedule fits the time.")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order of the data.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, such as model.blocks=6. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in the folder first.")] = False,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="Also record to Weights & Biases (offline without a login).")
    ] = False,
) -> None:
    """Train a model from text.

    Example: gpt train nano --minutes 3

    Example: gpt train tiny --data 'stories/*.jsonl' --epochs 2 --set model.blocks=8

    Ctrl-C finishes the step and saves; the same command with --resume goes on from there.
    """
    from engine import config
    from engine.run import Run

    if preset is None and not (resume and out):
        raise InputError("name a preset: gpt train nano, gpt train tiny or gpt train large")
    run = Run(out or Path("runs") / str(preset))
    budgets = {"steps": steps, "tokens": tokens, "epochs": epochs, "minutes": minutes}
    chosen = {name: value for name, value in budgets.items() if value is not None}
    if resume:
        if data or column or seed is not None or setting or overwrite or precision != "auto":
            raise InputError(
                "--resume goes on with the run's own recipe; only --steps, --tokens, --epochs or --minutes may change"
            )
        recipe = run.read_recipe()
    else:
        recipe = config.preset(str(preset))
    if chosen:
        budget = config.BudgetConfig(**chosen)  # type: ignore[arg-type]
        if budget.tokens is not None:
            budget = config.BudgetConfig(tokens=int(budget.tokens))
        recipe = dataclasses.replace(recipe, budget=budget)
    if data is not None:
        # A path is kept whole: a run may be resumed from another folder.
        recipe = config.override(recipe, "data.source", str(Path(data).resolve()) if Path(data).exists() else data)
        # Asked for by name, nothing else will do.
        recipe = config.override(recipe, "data.fallback", None)
    if column is not None:
        recipe = config.override(recipe, "data.column", column)
    if seed is not None:
        recipe = config.override(recipe, "loop.seed", seed)
    if precision != "auto":
        recipe = config.override(recipe, "precision", precision)
    for each in setting or []:
        recipe = config.override_text(recipe, each)
    start(recipe, run, device, resume=resume, overwrite=overwrite, wandb=wandb)


def make_room(recipe: "Recipe", run: "Run", overwrite: bool) -> None:
    """Refuse to mix a run with something else in its folder; an old run goes where that was asked for."""
    from train.data.shards import is_prepared
    from train.data.sources import open_source

    if not run.path.exists() or (run.path.is_dir() and not any(run.path.iterdir())):
        return
    if not run.config.exists():
        raise InputError(f"{run.path} is not empty and holds no run; choose another folder with --out")
    if not overwrite:
        raise InputError(
            f"{run.path} already holds a run: --resume goes on with it, --out puts this one elsewhere, "
            "--overwrite deletes it"
        )
    # Nothing is deleted that is not a run, or for a command that cannot work.
    run.read_recipe()
    if not is_prepared(recipe.data.source):
        open_source(recipe.data.source, column=recipe.data.column, limit=recipe.data.documents)
    shutil.rmtree(run.path)


def start(recipe: "Recipe", run: "Run", device: str, *, resume: bool, overwrite: bool, wandb: bool) -> None:
    """Run the training and say how it ended. Exit code 1 where it failed, 128 + signal where it was stopped."""
    from cli.console import Console
    from engine import runtime
    from train.loop import TrainingError
    from train.pretrain import pretrain

    machine = runtime.choose(device, recipe.precision)
    if not resume:
        make_room(recipe, run, overwrite)
    console = Console()
    go_on = f"go on with: gpt train {recipe.name} --out {run.path} --resume"
    try:
        outcome = pretrain(recipe, run, machine, console, resume=resume, wandb=wandb)
    except TrainingError as failure:
        console.say(f"training failed: {failure}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.say(f"stopped at once, what came after the last checkpoint is lost; {go_on}")
        raise typer.Exit(130) from None
    finally:
        console.close()
    if outcome.stopped_by is not None:
        console.say(f"saved {outcome.checkpoint.path}; {go_on}")
        raise typer.Exit(128 + outcome.stopped_by)
    console.say(f"report     {run.report}")
    if run.loss_plot.exists():
        console.say(f"loss plot  {run.loss_plot}")
    console.say(f'try it     gpt generate {run.path} "Once upon a time"')
    console.say(f"           gpt chat {run.path}")
