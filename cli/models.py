"""gpt generate, info, settings, doctor, export and import: the commands that need no training and little code."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli.options import CheckpointName, ModelOptions, RunArgument, SamplingOptions
from engine.errors import InputError


def generate(
    path: RunArgument,
    drawn: SamplingOptions,
    model: ModelOptions,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; nothing begins a document.")] = "",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many texts.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")] = None,
) -> None:
    """Let a model go on from a prompt.

    Example: gpt generate runs/nano "Once upon a time" --temperature 0.7 --seed 1
    """
    from engine import runtime
    from engine.chat_template import text_ends
    from engine.generate import document_prompt, generate, stream
    from engine.run import Run
    from engine.sampling import Sampling

    values = dataclasses.asdict(drawn)
    limits: dict[str, Any] = {"max_tokens": values.pop("max_tokens"), "stop": stop or ()}
    sampling = Sampling(**values)
    run, notice = Run(path), functools.partial(print, file=sys.stderr)
    network, tokenizer = run.load_model(runtime.choose(model.device, model.precision), model.checkpoint, notice)
    prompts = [document_prompt(tokenizer, prompt)] * count
    limits["stop_ids"] = text_ends(tokenizer, chat=run.read_recipe().chat)
    if count == 1:
        print(prompt, end="")
        for chunk in stream(network, tokenizer, prompts, sampling, **limits):
            print(chunk.text, end="", flush=True)
        print()
        return
    for number, completion in enumerate(generate(network, tokenizer, prompts, sampling, **limits), 1):
        print(f"--- {number} ---\n{prompt}{completion.text}")


def info(path: RunArgument) -> None:
    """Say what a run is: model, data, progress, checkpoints.

    Example: gpt info runs/nano
    """
    from engine import checkpoint
    from engine.config import IMPORTED
    from engine.run import Run
    from train.tracking import evaluation_parts, read_metrics

    run = Run(path)
    config, recipe = run.read_config(), run.read_recipe()
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
    if trained := [line for line in read_metrics(run.metrics) if "loss" in line]:
        last = trained[-1]
        progress = f"{last['step']:,} steps, {last['tokens']:,} tokens, {last['seconds'] / 60:.1f} minutes"
        rows.append(("trained", progress))
    best = checkpoint.best(run.checkpoints)
    for found in checkpoint.checkpoints(run.checkpoints):
        evaluation = found.evaluation()
        measured = ", ".join(evaluation_parts(evaluation)) if evaluation else "not evaluated"
        try:
            found.verify()
            state = "whole"
        except checkpoint.DamagedCheckpointError as damage:
            state = f"DAMAGED ({damage})"
        rows.append(("checkpoint", f"{found.path.name}: {measured}, {state}{', best' if found == best else ''}"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in (*rows, *config.get("versions", {}).items()):
        table.add_row(name, str(value))
    Console(soft_wrap=True, highlight=False).print(table)


def settings(
    preset: Annotated[str | None, typer.Argument(help="nano, tiny or large, whose values are shown.")] = None,
) -> None:
    """List every setting that --set takes, with its default and what it means.

    Example: gpt settings tiny
    """
    from engine import config

    for name, value, meaning in config.settings(config.preset(preset) if preset else config.Recipe):
        shown = "(by preset)" if value is ... else str(value).lower() if value in (None, True, False) else value
        print(f"{f'{name}={shown}':42} {meaning}")


def doctor(
    runs: Annotated[Path, typer.Option(help="The folder that runs are kept in.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
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


def export_run(
    path: RunArgument,
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    which: CheckpointName = "latest",
) -> None:
    """Write a model for transformers and other tools that read Hugging Face's files.

    Example: gpt export runs/nano --out nano-hf
    """
    _require_room(out)
    from engine.huggingface import export
    from engine.run import Run

    for file in export(Run(path), out, which, print):
        print(f"{file}: {file.stat().st_size:,} bytes")
    print(f"use it     transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
    print(f"           transformers.AutoTokenizer.from_pretrained({str(out)!r})")


def import_folder(
    folder: Annotated[Path, typer.Argument(help="Folder of a GPT-NeoX or Pythia model.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the run to make, such as runs/pythia.", show_default=False)],
) -> None:
    """Make a run of a pretrained model, which other commands then take like one trained here.

    Example: gpt import pythia-160m --out runs/pythia
    """
    _require_room(out)
    from engine.huggingface import import_

    model = import_(folder, out).model
    print(f"{out}: {model.parameters:,} parameters, context {model.context}, vocabulary {model.vocab_size:,}")
    print(f'try it     gpt generate {out} "Once upon a time"')


def _require_room(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there already and not an empty folder; choose another with --out")
