"""gpt runs, info, settings and doctor: which runs there are, what one is, what can be set, what this machine has."""

import dataclasses
import json
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column
from typer import Argument, Option

from cli.console import FRAMELESS, notice, print_table
from cli.options import RunArgument
from engine.errors import InputError


def runs(
    folder: Annotated[Path, Argument(help="The folder that runs are kept in.")] = Path("runs"),
    as_json: Annotated[bool, Option("--json", help="For programs.")] = False,
) -> None:
    """List all runs of a folder: what they are and began with, how far they have come, and how good they are.

    Example: gpt runs

    The loss is that of the newest evaluation, or else the last one of training.
    """
    from engine.disk import in_words
    from engine.runs import Listed, list_runs

    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of runs; train a run with `gpt train nano`, or name its --out")
    found = list_runs(folder)
    if as_json:
        print(json.dumps([dataclasses.asdict(each) | {"path": str(each.path)} for each in found], indent=2))
        return
    if not found:
        notice(f"{folder} holds no run; train one with `gpt train nano`")
        return

    def row(run: Listed) -> list[str]:
        loss = "" if run.loss is None else f"{run.loss:.3f}{'' if run.validated else ' in training'}"
        planned = f" of {run.steps:,}" if run.steps and run.steps != run.step else ""
        saved = "" if run.saved is None else datetime.fromtimestamp(run.saved).strftime("%Y-%m-%d %H:%M")
        state = "DAMAGED" if run.damage else run.state
        amounts = [f"{run.step:,}{planned}", loss, in_words(run.bytes)]
        return [str(run.path), run.kind, run.base or "", *amounts, saved, state]

    amounts = (Column(head, justify="right") for head in ("step", "loss", "size"))
    # In a pipe each run has a line of its own; where columns would be a few letters wide, the terminal breaks it.
    lines = not sys.stdout.isatty() or shutil.get_terminal_size().columns < 70
    print_table(("run", "kind", "base", *amounts, "saved", "state"), map(row, found), soft_wrap=lines, **FRAMELESS)
    for run in found:
        if run.damage:
            print(f"\n{run.path}: {run.damage}")


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
        ("model", f"{model.parameters:,} parameters, {model.shape}"),
        ("context", f"{model.context} tokens, vocabulary {model.vocab_size:,}"),
        ("data", recipe.data.source + (f", commit {recipe.data.revision}" if recipe.data.revision else "")),
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
