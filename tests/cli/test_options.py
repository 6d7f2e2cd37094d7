"""Options are declared once: Typer sees a group's fields, settings are found by name, and --resume refuses changes."""

import dataclasses
import inspect
from typing import Any

import pytest

from cli import options, train
from cli.main import COMMANDS
from engine.config import Recipe, settings
from engine.errors import InputError

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


def test_no_command_has_more_than_twelve_parameters() -> None:
    for panel in COMMANDS.values():
        for name, (function, _) in panel.items():
            assert len(inspect.signature(function).parameters) <= 12, name
