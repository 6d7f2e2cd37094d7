"""gpt bench-train: a result before each variant that takes long, and one that cannot run costs only itself."""

from dataclasses import replace

import pytest
import torch

from bench import training
from engine.config import PRESETS, ModelConfig, OptimizerConfig
from engine.runtime import Runtime
from train.optimizer import Optimizer


@pytest.mark.parametrize("failing", ["plain", "ours", "ours, compiled"])
def test_what_cannot_run_has_a_reason_and_all_else_figures(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> training.Step:
        raise torch.OutOfMemoryError("no room\nfor this")

    names = {"plain", "ours", "ours, compiled"}
    builds = {name: fail if name == failing else lambda: lambda: torch.ones(9).sum() for name in sorted(names)}
    monkeypatch.setattr(training, "variants", lambda *_, **__: builds)
    monkeypatch.setattr(training, "measured_peak", lambda *_, **__: 1e12)
    monkeypatch.setattr(training, "added_memory", lambda *_, **__: 1)
    recipe = replace(PRESETS["nano"], model=ModelConfig(200, 32, 2, 2, 64))
    first, second = training.bench_training(recipe, Runtime(torch.device("cpu"), "fp32"), rounds=1, compile=True)
    assert first["variants"].keys() == names - {failing, "ours, compiled"}
    assert second["variants"].keys() == names - {failing}
    assert second["missing"] == {failing: {"reason": "OutOfMemoryError: no room"}}
    assert (second["profile"] == []) == (failing == "ours")
    for found in second["variants"].values():
        assert 0 < found["host_seconds"] <= recipe.tokens_per_step / found["tokens_per_second"]
        assert (found["against_plain"] is None) == (failing == "plain")


def test_each_is_compared_with_the_faster_plain_attention_in_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(PRESETS["nano"], model=ModelConfig(200, 32, 2, 2, 64))
    bf16 = Runtime(torch.device("cpu"), "bf16")
    names = training.variants(recipe, bf16, compile=False).keys()
    assert len(names) == 8 and training.variants(recipe, Runtime(bf16.device, "fp32"), compile=False).keys() == {
        name for name in names if not name.endswith("fp32")
    }
    monkeypatch.setattr(training, "variants", lambda *_, **__: dict.fromkeys(names, lambda: lambda: torch.ones(9)))
    monkeypatch.setattr(training, "measured_peak", lambda *_, **__: 1e12)
    monkeypatch.setattr(training, "added_memory", lambda *_, **__: 1)
    (result,) = training.bench_training(recipe, bf16, rounds=1)
    for end in ("", ", fp32"):
        plain, written, ours = (
            result["variants"][name + end] for name in ("plain", "plain, attention written out", "ours")
        )
        best = max(plain["tokens_per_second"], written["tokens_per_second"])
        assert ours["against_plain"] == ours["tokens_per_second"] / best


def test_ours_is_trained_with_the_optimizer_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(PRESETS["nano"], model=ModelConfig(200, 32, 2, 2, 64))
    kinds = []
    real = Optimizer

    def optimizer(model: torch.nn.Module, config: OptimizerConfig, **rest: object) -> object:
        kinds.append(config)
        return real(model, config, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "Optimizer", optimizer)
    builds = training.variants(recipe, Runtime(torch.device("cpu"), "fp32"), compile=False)
    for name in ("ours", "ours, AdamW"):
        builds[name]()()
    assert kinds[0] == recipe.optimizer and kinds[1].kind == "adamw"
