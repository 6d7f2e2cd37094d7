"""bench-layernorm: what it measures, and what it says of a peer that cannot run or is wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import layernorm
from engine.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), "fp32")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layernorm, "copy_bandwidth", lambda device: 1e9)

    def once(function: Any, device: torch.device) -> float:
        function()
        return 0.5

    monkeypatch.setattr(layernorm, "median_seconds", once)


def test_every_width_is_timed_alone_and_with_the_residual() -> None:
    *_, result = layernorm.bench_layernorm(RUNTIME, widths=(8, 12), rows=4, providers=("ours", "torch"))
    assert [(point["width"], point["residual"]) for point in result["points"]] == [
        (8, False), (8, True), (12, False), (12, True),
    ]  # fmt: skip
    tensor = 4 * 8 * 4
    moved = {("forward", False): 2, ("forward", True): 4, ("backward", False): 3, ("backward", True): 4}
    for point in result["points"][:2]:
        for direction in layernorm.DIRECTIONS:
            for name in ("ours", "torch"):
                figures = point[direction][name]
                assert figures["bytes_per_second"] == moved[direction, point["residual"]] * tensor / 0.5
                assert figures["share"] == 1 and figures["relative_error"] < 1e-5


def test_a_wrong_or_failing_provider_has_a_reason_instead_of_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(1.1 * each for each in layernorm.plain(x, weight, residual))

    def failing(*arguments: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(layernorm, "PROVIDERS", {"wrong": lambda: wrong, "failing": lambda: failing})
    *_, result = layernorm.bench_layernorm(RUNTIME, widths=(8,), rows=4, providers=("wrong", "failing"))
    for direction in layernorm.DIRECTIONS:
        found = result["points"][0][direction]
        assert found["wrong"] == {"reason": f"ArithmeticError: wrong: the relative error of the {direction} is 0.1"}
        assert found["failing"] == {"reason": "RuntimeError: no such kernel"}
