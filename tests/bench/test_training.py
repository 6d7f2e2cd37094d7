"""gpt bench-train: a result before each variant that takes long, and one that cannot run costs only itself."""

from dataclasses import replace

import pytest
import torch

from bench import training
from engine.config import PRESETS, ModelConfig
from engine.runtime import Runtime


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
