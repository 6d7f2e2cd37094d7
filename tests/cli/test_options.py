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
from engine.config import Recipe, settings
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
    *("steps", "tokens", "epochs", "minutes"),
}


def marks(group: Any) -> dict[str, tuple[Any, ...]]:
    hints = options.get_type_hints(group, include_extras=True)
    return {field.name: hints[field.name].__metadata__ for field in dataclasses.fields(group)}


def other_value(default: Any) -> Any:
    return True if default is False else ["model.blocks=2"] if default is None else "other"


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_a_run_that_goes_on_refuses_every_option_that_would_change_it(group: Any) -> None:
    options.refuse_changes(group())
    options.refuse_changes(group(setting=[]))
    for field in dataclasses.fields(group):
        asked = group(**{field.name: other_value(field.default)})
        if field.name in FREE:
            options.refuse_changes(asked)
            continue
        with pytest.raises(InputError, match="own recipe") as refused:
            options.refuse_changes(asked)
        assert ("--steps" in str(refused.value)) == issubclass(group, options.Length), field.name


def test_zero_is_a_change_though_it_equals_false() -> None:
    with pytest.raises(InputError, match="own recipe"):
        options.refuse_changes(train.RewardOptions(margin=0.0))
    assert options.given_settings(train.TrainOptions(seed=0, stream=True)) == {"loop.seed": 0, "data.stream": True}


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
        (options.typed_name(name, each.annotation.__metadata__[0]), *get_args(each.annotation), each.default)
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
    known = {name for taken in TAKEN.values() for name, *_ in taken} | {"--help", "--version", "--full"}
    groups = {name.partition(".")[0] for name, _, _ in settings(Recipe) if "." in name}
    names = {name for name, _, _ in settings(Recipe)}
    # Where they are no advice: git's options, and the names of files and of a module's own attribute.
    apart = {"--always", "--dirty", "model.safetensors", "optimizer.safetensors", "model.decode_int8"}
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
