"""What the commands that train share: the options that change a recipe, the folder, and how a run ends."""

import dataclasses
import glob
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.launch import GO_ON, launch
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.config import Recipe
    from engine.run import Run
    from train.loop import Outcome

Steps = Annotated[int | None, typer.Option(help="Train for so many steps.")]
Tokens = Annotated[float | None, typer.Option(help="Train on so many tokens, such as 5e6.")]
Epochs = Annotated[float | None, typer.Option(help="Read the data so many times.")]
Minutes = Annotated[float | None, typer.Option(help="Train for so long; the schedule fits the time.")]
Batch = Annotated[int | None, typer.Option(help="Rows of one context in a step.")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", help="Any other setting, such as model.blocks=6. Repeatable.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in the folder first.")]
Gpus = Annotated[
    int | None, typer.Option(min=1, help="Train on so many GPUs of this machine; on a CPU, in so many processes.")
]
Shard = Annotated[
    bool, typer.Option("--shard", help="Each GPU holds a share of the model, as where it would not fit (FSDP).")
]
Nodes = Annotated[
    str | None,
    typer.Option(help="Machines, or MIN:MAX that may come and go; a run that is already in the folder goes on."),
]
Rendezvous = Annotated[str | None, typer.Option(help="Where machines meet: HOST:PORT, the same for all.")]
WandB = Annotated[bool, typer.Option("--wandb", help="Also record to Weights & Biases (offline without a login).")]

PRETRAINED, IMPORTED = "a pretrained run", "an imported model"
REWARD_MODEL, FINETUNED = "a reward model", "a finetuned run"


def located(data: str) -> str:
    """A path, or a glob, is made whole: a run may be resumed from another folder."""
    path = Path(data).expanduser()
    return str(path.resolve()) if path.exists() or glob.has_magic(data) else data


def located_setting(setting: str) -> str:
    """The same of a setting that may name a place."""
    from engine.config import PATHS

    name, equals, value = setting.partition("=")
    return f"{name}={located(value.strip())}" if equals and name.strip() in PATHS else setting


def adjust(
    recipe: "Recipe", budgets: dict[str, float | None], values: dict[str, object], settings: list[str] | None
) -> "Recipe":
    """The recipe with what was asked for on the command line; None, and precision "auto", was not asked for."""
    from engine import config

    scores = recipe.scores
    if chosen := {name: value for name, value in budgets.items() if value is not None}:
        budget = config.BudgetConfig(**chosen)  # type: ignore[arg-type]
        if budget.tokens is not None:
            budget = config.BudgetConfig(tokens=int(budget.tokens))
        recipe = dataclasses.replace(recipe, budget=budget)
    for name, value in values.items():
        if value not in (None, "auto"):
            recipe = config.override(recipe, name, value)
    for each in settings or []:
        recipe = config.override_text(recipe, located_setting(each))
    if recipe.scores != scores:
        raise InputError("model.scalar_head and reward.implicit make reward models: train one with `gpt reward RUN`")
    return recipe


def refuse_changes(*changes: object, length: bool = True) -> None:
    # 0 is a change, though it equals False.
    if any(change is not False and change not in (None, "auto", "latest", []) for change in changes):
        but = "; only --steps, --tokens, --epochs or --minutes may change" if length else ""
        raise InputError(f"--resume goes on with the run's own recipe{but}")


def resumed(target: "Run", base: Path | None, kind: str) -> "Recipe":
    """The recipe of a run to go on with, if it is of that kind (see kind_of) and began with that base."""
    from engine.run import Run

    recipe = target.read_recipe()
    if (found := kind_of(recipe)) != kind:
        raise InputError(
            f"{target.path} is {found}; name another --out, or go on with it: {go_on_with(target, recipe)}"
        )
    if base is None:
        return recipe
    from train.finetune import recognise_base

    return recognise_base(recipe, target, Run(base))


def kind_of(recipe: "Recipe") -> str:
    from engine import config

    if recipe.scores:
        return REWARD_MODEL
    if recipe.base is None:
        return IMPORTED if recipe.data.source == config.IMPORTED else PRETRAINED
    return FINETUNED if recipe.alignment.method == "none" else f"a run of {recipe.alignment.method}"


def go_on_with(run: "Run", recipe: "Recipe") -> str:
    """The command that goes on with a run, of whatever kind it is."""
    method = recipe.alignment.method
    aligned = {"none": "finetune", "ipo": "rlhf dpo --ipo"}.get(method, f"rlhf {method}")
    command = {
        IMPORTED: f"gpt finetune {run.path}",
        PRETRAINED: f"gpt train {recipe.name} --out {run.path} --resume",
        REWARD_MODEL: f"gpt reward {recipe.base} --out {run.path} --resume",
    }
    return command.get(kind_of(recipe), f"gpt {aligned} {recipe.base} --out {run.path} --resume")


def make_room(run: "Run", overwrite: bool, check: Callable[[], object]) -> None:
    """Refuse to mix a run with something else in its folder; an old run goes where that was asked for."""
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
    check()
    shutil.rmtree(run.path)


def distribute(gpus: int | None, nodes: str | None, rendezvous: str | None) -> None:
    """Go on in as many processes as were asked for, unless this is one of them; this one then ends when they do."""
    if (gpus or nodes) and "RANK" not in os.environ:
        raise typer.Exit(launch(gpus or 1, nodes, rendezvous))


def start(
    stage: "Callable[..., Outcome]",
    recipe: "Recipe",
    run: "Run",
    device: str,
    command: str,
    *,
    check: Callable[[], object] = lambda: None,
    resume: bool,
    overwrite: bool,
    wandb: bool,
) -> None:
    """Run the training and say how it ended. Exit code 1 where it failed, 128 + signal where it was stopped."""
    import torch

    from cli.console import Console
    from engine import processes, runtime
    from train.loop import TrainingError

    machine = runtime.choose(device, recipe.precision)
    together = processes.join(machine.device, recipe.loop.timeout_minutes)
    machine = dataclasses.replace(machine, processes=together)

    def begin() -> "tuple[Recipe, bool]":
        # Processes that were started anew, or joined by another machine, go on with what they began.
        again = GO_ON in os.environ or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if again and run.config.exists():
            return run.read_recipe(), True
        if not resume:
            make_room(run, overwrite, check)
        return recipe, resume

    recipe, resume = together.from_main(begin)
    console = Console()
    go_on = f"go on with: {command} --out {run.path} --resume"
    try:
        outcome = stage(recipe, run, machine, console, resume=resume, wandb=wandb)
    except TrainingError as failure:
        console.say(f"training failed: {failure}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.say(f"stopped at once, what came after the last checkpoint is lost; {go_on}")
        raise typer.Exit(130) from None
    except InputError:
        raise
    except Exception:
        if together.count == 1:
            raise
        # To end in good order is to wait for the others, who may be waiting for this one, or gone.
        traceback.print_exc()
        os._exit(1)
    finally:
        console.close()
    if together.count > 1:
        torch.distributed.destroy_process_group()
    if outcome.stopped_by is not None:
        console.say(f"saved {outcome.checkpoint.path}; {go_on}")
        raise typer.Exit(128 + outcome.stopped_by)
    console.say(f"report     {run.report}")
    if run.loss_plot.exists():
        console.say(f"loss plot  {run.loss_plot}")
    if recipe.scores:
        return
    if not recipe.chat:
        console.say(f'try it     gpt generate {run.path} "Once upon a time"')
    console.say(f"{'' if not recipe.chat else 'try it':11}gpt chat {run.path}")
