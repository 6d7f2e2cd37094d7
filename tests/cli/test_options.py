"""Options are declared once: Typer sees a group's fields, settings are found by name, and --resume refuses changes."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from cli import options, train
from cli.main import COMMANDS, app
from cli.training import refuse_changes
from engine.config import Recipe, override, preset, settings
from engine.errors import InputError
from tests.cli.conftest import Gpt

ROOT = Path(__file__).parents[2]
GROUPS = [
    *(train.TrainOptions, train.FinetuneOptions, train.RewardOptions),
    *(train.PPOOptions, train.GRPOOptions, train.DPOOptions),
]
# What a run that goes on may be told; everything else is its own recipe's.
FREE = {
    *("out", "device", "resume", "wandb", "gpus", "shard", "nodes", "rendezvous", "verify", "ipo"),
    *("steps", "tokens", "epochs", "minutes", "hours"),
}


def marks(group: Any) -> dict[str, tuple[Any, ...]]:
    hints = options.get_type_hints(group, include_extras=True)
    return {field.name: hints[field.name].__metadata__ for field in dataclasses.fields(group)}


def other_value(name: str, default: Any) -> Any:
    """A value that is not the default, of a type that its setting takes."""
    if name == "setting":
        return ["model.blocks=2"]
    if name == "precision":
        return "bf16"
    known = {"data": "x", "reward": "x", "seed": 7, "lora": 8, "group": 4, "batch": 3, "kl_target": 0.5}
    text = "column" in name or default == "latest"
    return True if default is False else known.get(name, "other" if text else 0.25)


RUN = override(preset("nano"), "data.source", "stories")


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_a_run_that_goes_on_refuses_every_option_that_would_change_it(group: Any) -> None:
    refuse_changes(group(), RUN, {})
    refuse_changes(group(setting=[]), RUN, {})
    for field in dataclasses.fields(group):
        value = other_value(field.name, field.default)
        asked = group(**{field.name: value})
        if field.name in FREE:
            refuse_changes(asked, RUN, {})
            continue
        with pytest.raises(InputError, match=r"own recipe|leave out one") as refused:
            refuse_changes(asked, RUN, {})
        if field.name != "overwrite":
            assert ("--steps" in str(refused.value)) == issubclass(group, options.Length), field.name
            # As the run was begun, it may be gone on with.
            refuse_changes(asked, RUN, {field.name: value})


def test_what_is_the_runs_own_is_taken_and_another_value_is_named_beside_it() -> None:
    run = override(override(RUN, "loop.seed", 4), "model.vocab_size", 380)
    same = train.TrainOptions(seed=4, data="stories", setting=["model.blocks=4", "model.vocab_size = 380"])
    refuse_changes(same, run, {})
    refuse_changes(train.TrainOptions(setting=["model.vocab_size=400"]), run, {"setting": ["model.vocab_size=400"]})
    for asked, named in {
        train.TrainOptions(seed=5): "--seed is 4, not 5",
        train.TrainOptions(data="tinystories"): "--data is stories, not tinystories",
        train.TrainOptions(precision="bf16"): "--precision is auto, not bf16",
        train.FinetuneOptions(rate=0.5): "--rate is not given, not 0.5",
        train.PPOOptions(reward="other"): "--reward is program, not other",
    }.items():
        with pytest.raises(InputError, match=named):
            refuse_changes(asked, run, {})
    with pytest.raises(InputError, match=r"--set model\.blocks is 4, not 5"):
        refuse_changes(train.TrainOptions(setting=["model.width=128", "model.blocks=5"]), run, {})
    with pytest.raises(InputError, match=r"--rate is 0\.3, not 0\.5"):
        refuse_changes(train.FinetuneOptions(rate=0.5), run, {"rate": 0.3})


def test_zero_is_a_change_though_it_equals_false() -> None:
    with pytest.raises(InputError, match="own recipe"):
        refuse_changes(train.RewardOptions(margin=0.0), override(RUN, "reward.margin", 1.0), {})
    assert options.given_settings(train.TrainOptions(seed=0, stream=True)) == {"loop.seed": 0, "data.stream": True}
    # What the run has settled since is not undone by what it was asked for.
    assert options.given_settings(train.TrainOptions(seed=0, steps=3, resume=True)) == {"budget.steps": 3}


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_setting_that_an_option_names_is_one(group: Any) -> None:
    known = {name for name, _, _ in settings(Recipe)}
    assert {mark for each in marks(group).values() for mark in each if isinstance(mark, str)} <= known


def test_a_command_shows_the_fields_of_its_groups_its_own_first() -> None:
    names = list(inspect.signature(options.grouped(train.finetune)).parameters)
    assert names[:5] == ["run", "out", "data", "batch", "rate"] and "prompt_column" in names and "asked" not in names
    seen: dict[str, Any] = {}

    def command(length: options.Length, folder: str) -> None:
        seen.update(length=length, folder=folder)

    options.grouped(command)(steps=3, tokens=None, epochs=None, minutes=None, folder="here")
    assert seen == {"length": options.Length(steps=3), "folder": "here"}


def leaves(app: typer.Typer, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command: its words, and the function that Typer reads."""
    for each in app.registered_commands:
        yield (*words, str(each.name)), each.callback
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from leaves(group.typer_instance, (*words, str(group.name)))


# Every parameter of every command: name as typed, type, Typer's own description, default.
TAKEN: dict[tuple[str, ...], list[tuple[str, Any, Any, Any]]] = {
    words: [
        (options.typed_name(name, each.annotation.__metadata__[0]), *get_args(each.annotation)[:2], each.default)
        for name, each in inspect.signature(command).parameters.items()
    ]
    for words, command in leaves(app)
}


def with_value(words: tuple[str, ...], chosen: str, value: str) -> list[str]:
    """Return a command line with this value, and something for all else that the command needs."""
    line = list(words)
    for name, _, _, default in TAKEN[words]:
        if name == chosen:
            line += [f"{name}={value}" if name.startswith("--") else value]
        elif default is inspect.Parameter.empty:
            line += [f"{name}=nothing" if name.startswith("--") else "nothing"]
    return line


@pytest.mark.parametrize("words", TAKEN, ids=" ".join)
def test_every_number_is_bounded_on_both_sides_and_no_name_may_be_empty(gpt: Gpt, words: tuple[str, ...]) -> None:
    """Refused before the command does anything: what it needs beside is not there, and nobody asks for it."""
    for name, kind, _, default in TAKEN[words]:
        kinds = get_args(kind) or (kind,)
        values = (
            ["nan", "-1e300", "1e300", "1e400"]
            if float in kinds
            else [f"-{10**20}", f"{10**40}"]
            if int in kinds
            else [""]
        )
        for value in values if bool not in kinds and default != "" else ():
            done = gpt(*with_value(words, name, value))
            assert done.code == 2 and name.lower() in done.err.lower(), f"{name}={value}: {done.out}{done.err}"
            assert re.search("must be|is not in the range|is empty", done.err), f"{name}={value}: {done.err}"
    assert not list(Path().iterdir())


def test_every_path_says_in_its_help_what_it_must_be() -> None:
    paths = [(words, *each) for words, taken in TAKEN.items() for each in taken if "Path" in str(each[1])]
    assert len(paths) > 30
    for words, name, _, info, _ in paths:
        assert re.search("folder|file|run", info.help, re.IGNORECASE), f"{words} {name}: {info.help}"


def test_every_option_and_setting_that_a_message_names_is_one() -> None:
    known = {name for taken in TAKEN.values() for name, *_ in taken} | {
        "--help",
        "--version",
        "--full",
        "--install-completion",
    }
    groups = {name.partition(".")[0] for name, _, _ in settings(Recipe) if "." in name}
    names = {name for name, _, _ in settings(Recipe)}
    # Of git, pip, pytest and llama.cpp; names of files and of attributes; a method of transformers.
    apart = {
        "--always",
        "--dirty",
        "--quiet",
        "--disable-pip-version-check",
        "--tb",
        "--continue-on-collection-errors",
        "--output-format",
        "--held-out",  # of bench.sweeps
        "--vary",
        "--rates",
        "--change",
        "--shapes",
        "--batches",
        "--workers",
        "model.safetensors",
        "optimizer.safetensors",
        "model.decode_int8",
        "model.embed_tokens",  # as transformers calls weights
        "model.layers",
        "model.gguf",
        "model.generate",
    }
    for path in (each for room in ("cli", "engine", "train", "rlhf", "bench") for each in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", node.value)) - known
                dotted = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(groups)})\.\w+", node.value)) - names
                assert (found | dotted) <= apart, f"{path}: {node.value}"


def test_no_command_has_more_than_twelve_parameters() -> None:
    for panel in COMMANDS.values():
        for name, (function, _) in panel.items():
            assert len(inspect.signature(function).parameters) <= 12, name
