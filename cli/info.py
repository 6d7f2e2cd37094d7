"""gpt info, settings and doctor: what a run is, what can be set, and what this machine has."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from cli.console import FRAMELESS, print_table
from cli.options import RunArgument
from engine.errors import InputError


def info(path: RunArgument) -> None:
    """Say what a run is: model, data, progress, checkpoints.

    Example: gpt info runs/nano
    """
    from engine import checkpoint
    from engine.config import IMPORTED
    from engine.run import Run
    from train.tracking import evaluation_parts, read_metrics

    run = Run(path)
    recipe = run.read_recipe()
    model = recipe.model
    rows = [
        ("run", f"{path} ({recipe.name})"),
        ("model", f"{model.parameters:,} parameters, {model.blocks} blocks, {model.width} wide, {model.heads} heads"),
        ("context", f"{model.context} tokens, vocabulary {model.vocab_size:,}"),
        ("data", recipe.data.source),
    ]
    if recipe.base is not None:
        rows.append(("base", f"{recipe.base}, step {recipe.base_step}"))
    if recipe.data.source != IMPORTED:
        budget = (f"{value:,} {name}" for name, value in vars(recipe.budget).items() if value is not None)
        rows.append(("budget", next(budget)))
    notices: list[str] = []
    if trained := [line for line in read_metrics(run.metrics, notices.append) if "loss" in line]:
        last = trained[-1]
        minutes = (last.get("seconds") or 0) / 60
        rows.append(("trained", f"{last['step']:,} steps, {last.get('tokens') or 0:,} tokens, {minutes:.1f} minutes"))
    rows += [("metrics", notice) for notice in notices]
    best = checkpoint.best(run.checkpoints)
    for found in checkpoint.checkpoints(run.checkpoints):
        doubts: list[str] = []
        evaluation = found.evaluation(doubts.append)
        measured = ", ".join(evaluation_parts(evaluation) if evaluation else doubts or ["not evaluated"])
        try:
            found.verify()
            run.require_identity(found)
            state = "whole"
        except (checkpoint.DamagedCheckpointError, InputError) as damage:
            state = f"DAMAGED ({damage})"
        rows.append(("checkpoint", f"{found.path.name}: {measured}, {state}{', best' if found == best else ''}"))
    rows += run.read_config()["versions"].items()
    print_table((), rows, soft_wrap=True, show_header=False, **FRAMELESS)


def settings(
    preset: Annotated[str | None, Argument(help="nano, tiny or large, whose values are shown.")] = None,
) -> None:
    """List every setting that --set takes, with its default and what it means.

    Example: gpt settings tiny
    """
    from engine import config

    for name, value, meaning in config.settings(config.preset(preset) if preset else config.Recipe):
        shown = "(by preset)" if value is ... else str(value).lower() if value in (None, True, False) else value
        print(f"{f'{name}={shown}':42} {meaning}")


def doctor(
    runs: Annotated[Path, Option(help="The folder that runs are kept in.")] = Path("runs"),
    as_json: Annotated[bool, Option("--json", help="For programs.")] = False,
) -> None:
    """Say what this machine has, and what each thing means for a run. Exit code 1 where something needed is broken.

    Example: gpt doctor --json
    """
    from cli.checks import findings

    found = list(findings(runs))
    if as_json:
        print(json.dumps([each._asdict() for each in found], indent=2))
    else:
        for each in found:
            mark = {"good": "", "note": "note: ", "broken": "BROKEN: "}[each.state]
            print(f"{each.name:13} {each.found}\n{'':13} {mark}{each.meaning}")
    if any(each.state == "broken" for each in found):
        raise typer.Exit(1)
