"""Presets have the sizes of the design, and settings are typed, checked and survive a round trip."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from engine.config import (
    PRESETS,
    BudgetConfig,
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    from_dict,
    override,
    override_text,
    preset,
    to_dict,
)
from engine.errors import InputError
from engine.model import GPT


@pytest.mark.parametrize(
    ("name", "shape", "millions"),
    [
        ("nano", (4096, 128, 4, 4, 256), 1.84),
        ("tiny", (28_000, 256, 12, 8, 256), 23.8),
        ("large", (28_000, 1024, 24, 16, 512), 359),
    ],
)
def test_presets_have_the_shapes_and_parameter_counts_of_the_design(
    name: str, shape: tuple[int, ...], millions: float
) -> None:
    config = preset(name).model
    assert (config.vocab_size, config.width, config.blocks, config.heads, config.context) == shape
    assert config.parameters / 1e6 == pytest.approx(millions, rel=0.025)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in GPT(config).parameters()) == config.parameters


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(InputError, match=r"'huge'.*nano, tiny, large"):
        preset("huge")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.blocks=6", 6),
        (" model.blocks = 6 ", 6),
        ("data.documents=1_000", 1000),
        ("data.documents=2e3", 2000),
        ("data.documents=none", None),
        ("data.source=a=b.txt", "a=b.txt"),
        ("data.holdout=0.1", 0.1),
        ("optimizer.weight_decay=0", 0.0),
        ("optimizer.kind=adamw", "adamw"),
        ("loop.compile=yes", True),
        ("loop.compile=False", False),
        ("loop.compile=None", None),
        ("precision=fp32", "fp32"),
    ],
)
def test_an_override_is_parsed_to_the_type_of_its_setting(setting: str, expected: Any) -> None:
    path = setting.partition("=")[0].strip().split(".")
    value: Any = override_text(preset("nano"), setting)
    for name in path:
        value = getattr(value, name)
    assert value == expected and type(value) is type(expected)


def test_settings_need_to_fit_only_together() -> None:
    texts = ["model.pattern=fw", "model.window=9", "model.heads=3", "model.width=24", "loop.batch=6"]
    for order in (texts, texts[::-1]):
        changed = override_text(preset("nano"), *order)
        assert (changed.model.window, changed.model.heads, changed.model.width, changed.loop.batch) == (9, 3, 24, 6)
    with pytest.raises(InputError, match=r"--set model\.pattern=fw: .* must come with a window"):
        override_text(preset("nano"), "model.blocks=2", "model.pattern=fw", "model.heads=5")


def test_an_override_leaves_the_rest_and_the_original_alone() -> None:
    original = preset("nano")
    changed = override(original, "model.blocks", 6)
    assert changed == dataclasses.replace(original, model=dataclasses.replace(original.model, blocks=6))
    assert preset("nano") is original and original.model.blocks == 4


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.blokcs=6", r"'blokcs'.*vocab_size, width, blocks"),
        ("modle.blocks=6", r"'modle'.*name, model, budget"),
        ("model=6", r"model\.width, model\.blocks"),
        ("model.blocks.more=6", "blocks is a single setting"),
        ("model.blocks", "path=value"),
        ("=6", "no setting"),
        ("model.blocks=six", r"'six'.*type int"),
        ("model.blocks=2.5", r"'2\.5'.*type int"),
        ("model.blocks=none", "type int"),
        ("model.blocks=inf", "type int"),
        ("model.blocks=0", "at least 1"),
        ("model.width=130", "multiple of 8"),
        ("model.norm_eps=0", "above 0"),
        ("data.holdout=1", "above 0 and below 1"),
        ("data.documents=0", "at least 1"),
        ("optimizer.clip=nan", "type float"),
        ("optimizer.clip=0", "above 0"),
        ("optimizer.matrix_rate=-1", "at least 0"),
        ("optimizer.beta2=1", "below 1"),
        ("optimizer.kind=sgd", "muon, adamw"),
        ("schedule.warmup=2", "at least 0 and below 1"),
        ("loop.batch=0", "at least 1"),
        ("loop.micro_batch=3", "not a multiple"),
        ("loop.samples=-1", "at least 0"),
        ("loop.seed=-1", "at least 0"),
        ("loop.compile=perhaps", "type bool"),
        ("precision=fp8", "auto, fp32, bf16, fp16"),
    ],
)
def test_a_wrong_override_says_what_was_expected(setting: str, expected: str) -> None:
    recipe = override(preset("nano"), "loop.batch", 16)
    with pytest.raises(InputError, match=expected):
        override_text(recipe, setting)


@pytest.mark.parametrize(
    ("path", "value"), [("model.blocks", 2.0), ("model.blocks", True), ("data.source", 3), ("loop.compile", 1)]
)
def test_an_override_by_value_is_typed_too(path: str, value: Any) -> None:
    with pytest.raises(InputError, match="must be of type"):
        override(preset("nano"), path, value)


@pytest.mark.parametrize("budget", [{}, {"steps": 1, "minutes": 1.0}, {"steps": 0}, {"minutes": -1.0}], ids=str)
def test_a_budget_is_exactly_one_number_above_zero(budget: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"exactly one|above 0"):
        BudgetConfig(**budget)


UNUSUAL = Recipe(
    name="mine",
    model=ModelConfig(vocab_size=300, width=24, blocks=1, heads=2, context=8, rotary_base=500.0),
    budget=BudgetConfig(epochs=2),
    data=DataConfig(source="\u00fc.txt", column="text", documents=3),
    optimizer=OptimizerConfig(kind="adamw"),
    schedule=ScheduleConfig(shape="wsd"),
    loop=LoopConfig(batch=4, micro_batch=2, compile=False),
    precision="bf16",
)


@pytest.mark.parametrize("recipe", [*PRESETS.values(), UNUSUAL], ids=lambda recipe: recipe.name)
def test_a_recipe_survives_the_round_trip_through_json(recipe: Recipe) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": 3}, r"recipe\.model must be a group"),
        ({"model": {"width": 4}}, r"recipe\.model is not whole"),
        ({"surprise": 1}, "does not know: surprise"),
        ({"name": None}, r"recipe\.name.*type str"),
        ({"data": {"documents": "many"}}, r"recipe\.data\.documents.*type int"),
        ({"data": {"documents": "3"}}, r"recipe\.data\.documents.*type int"),
        ({"precision": ["fp32"]}, "fp32, bf16"),
        ({"loop": {"batch": -1}}, "at least 1"),
    ],
)
def test_a_stored_recipe_that_is_not_one_is_refused_by_name(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        from_dict(to_dict(UNUSUAL) | change)


def test_derived_numbers_follow_from_the_shape() -> None:
    config = ModelConfig(vocab_size=100, width=8, blocks=3, heads=2, context=16)
    assert config.head_dim == 4
    assert config.matmul_parameters == 3 * 12 * 64 + 800
    assert config.flops_per_token == 6 * config.matmul_parameters + 6 * 3 * 8 * 16
    assert dataclasses.replace(UNUSUAL, model=config).tokens_per_step == 4 * 16
