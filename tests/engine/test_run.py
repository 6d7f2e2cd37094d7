"""A run's folder: what it holds, and what is said where it holds something else."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import checkpoint
from engine.config import BudgetConfig, ModelConfig, Recipe, override, settings, to_dict
from engine.errors import InputError
from engine.model import GPT
from engine.run import Run, versions
from engine.runtime import choose
from engine.tokenizer import Tokenizer, train_tokenizer

CPU = choose("cpu", "fp32")


@pytest.fixture
def run(small_config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path) -> Run:
    """Checkpoints 1, 2 and 10 of a model whose norms are filled with the step; the second is the best."""
    run = Run(tmp_path / "runs" / "small")
    run.write_recipe(Recipe(name="small", model=small_config, budget=BudgetConfig(steps=10)))
    tokenizer.save(run.tokenizer)
    for step, loss in ((1, 3.0), (2, 1.0), (10, 2.0)):
        model = GPT(small_config)
        torch.nn.init.constant_(model.final_norm.weight, step)
        saved = checkpoint.save(run.checkpoints, step, {"model": model.state_dict()}, {"state": {"step": step}})
        saved.record_evaluation({"loss": loss})
    return run


@pytest.mark.parametrize(("which", "step"), [("latest", 10), ("best", 2), ("1", 1), ("10", 10)])
def test_the_model_of_any_checkpoint_loads_with_its_tokenizer(run: Run, which: str, step: int) -> None:
    model, tokenizer = run.load_model(CPU, which)
    assert torch.equal(model.final_norm.weight, torch.full_like(model.final_norm.weight, step))
    assert not model.training and model.config == run.read_recipe().model
    assert tokenizer.vocab_size == model.config.vocab_size


def test_a_model_loads_in_the_dtype_of_the_runtime(run: Run) -> None:
    model, _ = run.load_model(choose("cpu", "bf16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_nothing_is_unpickled_to_load_a_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    with monkeypatch.context() as patch:
        for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            patch.setattr(owner, name, refuse)
        run.load_model(CPU)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_loaded(run: Run) -> None:
    damage(run, 10)
    notices: list[str] = []
    model, _ = run.load_model(CPU, notice=notices.append)
    assert model.final_norm.weight[0] == 2
    assert len(notices) == 1 and "step-00000010" in notices[0]


def damage(run: Run, *steps: int) -> None:
    for step in steps:
        (run.checkpoints / f"step-{step:08d}" / "model.safetensors").write_bytes(b"gone")


def remove_checkpoints(run: Run) -> None:
    run.checkpoints.rename(run.path / "elsewhere")


def other_tokenizer(run: Run) -> None:
    train_tokenizer(["abc abc abd"], 268).save(run.tokenizer)


def other_width(run: Run) -> None:
    config = json.loads(run.config.read_text())
    config["recipe"]["model"]["width"] *= 2
    del config["sha256"]
    run.config.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "which", "expected"),
    [
        (lambda run: run.config.unlink(), "latest", r"small is not a run.*no config\.json.*gpt train"),
        (lambda run: run.config.write_text("{"), "latest", r"config\.json is damaged: line 1 is no JSON"),
        (lambda run: run.config.write_bytes(b"\xff\xfe"), "latest", r"config\.json is damaged: 'utf-8'"),
        (lambda run: run.config.write_text("[]"), "latest", r"config\.json is damaged: it should be an object"),
        (
            lambda run: run.config.write_text("{}"),
            "latest",
            r"config\.json is damaged: recipe is missing; bring",
        ),
        (lambda run: run.config.write_text('{"recipe": 3}'), "latest", r"recipe should be an object, not 3"),
        (
            lambda run: run.config.write_text('{"recipe": {"model": 3}}'),
            "latest",
            r"is damaged: .* group of settings",
        ),
        (
            lambda run: run.config.write_text('{"recipe": {}, "versions": 3}'),
            "latest",
            r"versions should be an object",
        ),
        (lambda run: run.tokenizer.unlink(), "latest", r"cannot read the tokenizer .*tokenizer\.model"),
        (other_tokenizer, "latest", r"tokenizer\.model has 268 tokens; .* built for 400"),
        (other_width, "latest", r"step-00000010 does not fit the model that .*config\.json"),
        (remove_checkpoints, "latest", "has no latest checkpoint.*begun"),
        (remove_checkpoints, "best", "has no best checkpoint"),
        (remove_checkpoints, "3", "no checkpoint '3'; it has none"),
        (lambda run: None, "3", "no checkpoint '3'; it has 1, 2, 10"),
        (lambda run: damage(run, 2), "best", r"step-00000002/model\.safetensors .*choose another"),
        (lambda run: damage(run, 1), "1", r"step-00000001/model\.safetensors .*choose another"),
        (lambda run: damage(run, 1, 2, 10), "latest", "every checkpoint of .* is damaged"),
    ],
)
def test_what_cannot_be_loaded_says_what_is_wrong_and_where(
    run: Run, spoil: Callable[[Run], None], which: str, expected: str
) -> None:
    spoil(run)
    with pytest.raises(InputError, match=expected):
        run.load_model(CPU, which)


@pytest.fixture
def whole(run: Run) -> Run:
    """The same run, with a checkpoint that knows what it was made with."""
    recipe = run.read_recipe()
    weights = GPT(recipe.model).state_dict()
    checkpoint.save(run.checkpoints, 11, {"model": weights}, {}, identity=run.identity(recipe))
    return run


@pytest.mark.parametrize("which", ["latest", "11"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.heads", 1),
        ("model.rotary_base", 10_001.0),
        ("model.norm_eps", 2e-5),
        ("model.parallel_residual", True),
        ("model.context", 33),
        ("chat", True),
        ("reward.implicit", True),
        ("reward.beta", 0.25),
        ("base_step", 3),
    ],
)
def test_another_config_than_a_checkpoint_was_made_with_is_refused_by_name(
    whole: Run, name: str, value: Any, which: str
) -> None:
    recipe = whole.read_recipe()
    before = {each: now for each, now, _ in settings(recipe)}[name]
    whole.write_recipe(override(recipe, name, value))
    expected = f"{name} is {value!r} by .*config.json, but .*step-00000011 was made with {before!r}.*; set it back"
    with pytest.raises(InputError, match=expected):
        whole.find_checkpoint(which)
    with pytest.raises(InputError, match=f"{name} is .* by the options, but .*leave the option out"):
        whole.find_checkpoint(which, recipe=override(recipe, name, value))
    whole.write_recipe(override(recipe, "loop.keep", 9))
    assert whole.load_model(CPU, which)


def test_another_tokenizer_than_a_checkpoint_was_made_with_is_refused(whole: Run) -> None:
    model = bytearray(whole.tokenizer.read_bytes())
    for place in range(100, len(model), 997):
        model[place] ^= 1
        whole.tokenizer.write_bytes(model)
        with pytest.raises(InputError, match=r"tokenizer\.model is damaged, or another run's: .*; bring it back from"):
            whole.load_model(CPU)
        model[place] ^= 1


def test_no_flipped_bit_of_a_config_goes_unnoticed(run: Run) -> None:
    original, recipe = run.config.read_bytes(), run.read_recipe()
    for place in range(0, len(original), 3):
        run.config.write_bytes(original[:place] + bytes([original[place] ^ 1 << place % 7]) + original[place + 1 :])
        try:
            assert run.read_recipe() == recipe
        except InputError as error:
            assert "config.json" in str(error) and "bring it back from a copy" in str(error)


def test_settings_of_any_size_are_refused_before_a_model_is_made(run: Run) -> None:
    content = json.loads(run.config.read_text())
    del content["sha256"]
    for name in ("blocks", "width"):
        model = content["recipe"]["model"] | {name: 10**9}
        run.config.write_text(json.dumps(content | {"recipe": content["recipe"] | {"model": model}}))
        # Beyond the bounds of the setting, or else beyond what the checkpoint holds.
        with pytest.raises(InputError, match=f"model.{name} is 1000000000|does not fit the model"):
            run.load_model(CPU)


@pytest.mark.parametrize("is_file", [False, True], ids=["missing", "a file"])
def test_a_path_that_is_no_folder_is_refused(is_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    if is_file:
        path.write_text("text")
    with pytest.raises(InputError, match="nothing"):
        Run(path).load_model(CPU)
    assert not Run(path).has_checkpoint()


def test_the_recipe_is_kept_with_the_versions_it_ran_on(run: Run) -> None:
    stored = run.read_config()
    assert stored["versions"] == versions()
    assert {"python", "platform", "torch", "commit"} <= stored["versions"].keys()
    assert run.read_recipe().name == "small" and run.has_checkpoint()


def with_paths(recipe: Recipe, **paths: str) -> Recipe:
    for name, path in paths.items():
        recipe = override(recipe, name.replace("_", "."), path)
    return recipe


def test_a_project_can_be_moved(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    chat = Run(project / "runs" / "chat")
    for folder in ("runs/base", "runs/judge", "texts"):
        (project / folder).mkdir(parents=True)
    recipe = with_paths(
        run.read_recipe(),
        base=str(project / "runs/base"),
        data_source=str(project / "texts/*.jsonl"),
        data_tokenizer=str(chat.path / "own.model"),
        alignment_reward=str(project / "runs/judge"),
    )
    chat.write_recipe(recipe)
    assert str(tmp_path) not in json.dumps(chat.read_config()["recipe"])
    assert chat.read_recipe() == recipe
    project.rename(tmp_path / "moved")
    moved = Run(tmp_path / "moved" / "runs" / "chat")
    found = json.loads(json.dumps(to_dict(recipe)).replace(str(project), str(tmp_path / "moved")))
    assert to_dict(moved.read_recipe()) == found
    monkeypatch.chdir(moved.path)
    assert to_dict(Run(Path()).read_recipe()) == found


def test_a_run_that_was_moved_alone_finds_what_stayed(run: Run, tmp_path: Path) -> None:
    chat = Run(tmp_path / "runs" / "chat")
    recipe = with_paths(run.read_recipe(), base=str(run.path), data_source=str(tmp_path / "gone.txt"))
    chat.write_recipe(recipe)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    chat.path.rename(tmp_path / "elsewhere/deep/chat")
    moved = Run(tmp_path / "elsewhere" / "deep" / "chat").read_recipe()
    assert moved.base == str(run.path) and moved.data.source == str(tmp_path / "elsewhere" / "gone.txt")


def test_names_and_the_whole_paths_of_older_versions_are_left_alone(run: Run) -> None:
    recipe = with_paths(run.read_recipe(), base="/data/runs/base", data_source="stories")
    run.write_recipe(recipe)
    assert run.read_recipe() == recipe
    run.config.write_text(json.dumps({"recipe": to_dict(override(recipe, "data.source", "./texts/*.txt"))}))
    assert (run.read_recipe().base, run.read_recipe().data.source) == ("/data/runs/base", "./texts/*.txt")
