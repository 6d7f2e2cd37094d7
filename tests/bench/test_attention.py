"""The attention benchmark: no figure for what is wrong or cannot run, a record after every point, and a picture."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import attention
from bench.attention import Attend, Shape
from bench.timing import copy_bandwidth, median_seconds
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "fp32")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "measured_peak", lambda runtime: 1e12)
    monkeypatch.setattr(attention, "copy_bandwidth", lambda device: 1e11)
    monkeypatch.setattr(attention, "median_seconds", lambda function, device: len(function()) / 1000)


def last(**options: Any) -> dict[str, Any]:
    return list(attention.bench_attention(CPU, head_dims=[32], lengths=[64], tokens=128, **options))[-1]


def provider(monkeypatch: pytest.MonkeyPatch, attend: Attend) -> None:
    @contextmanager
    def odd(shape: Shape, device: torch.device) -> Iterator[Attend]:
        yield attend

    monkeypatch.setitem(attention.PROVIDERS, "odd", odd)


def test_flops_are_those_of_the_products() -> None:
    full = Shape(head_dim=64, causal=False, length=512, batch=2, width=1024)
    assert full.heads == 16
    assert full.flops("forward") == 4 * 2 * 16 * 512 * 512 * 64
    assert full.flops("backward") == 2.5 * full.flops("forward")
    assert Shape(64, True, 512, 2, 1024).flops("forward") == full.flops("forward") / 2


def test_every_provider_that_runs_here_is_right_and_has_a_figure() -> None:
    result = last(providers=["ours", "plain", "flash"])
    assert [(point["causal"], point["batch"], point["heads"]) for point in result["points"]] == [
        (True, 2, 64),
        (False, 2, 64),
    ]
    for verdicts, point in zip(result["checks"], result["points"], strict=True):
        for direction, outputs in (("forward", 1), ("backward", 3)):
            for name in ("ours", "plain", "flash"):
                assert 0 < verdicts[direction][name]["relative_error"] < 1e-4
                # The stand-in for a clock counts what the function gives: out, or dq, dk and dv.
                assert point[direction][name]["seconds"] == outputs / 1000


def test_what_cannot_run_here_is_recorded_with_its_reason() -> None:
    point = last(providers=["ours", "cudnn"], masks=[True])["points"][0]
    assert "RuntimeError" in point["forward"]["cudnn"]["reason"]
    assert "seconds" in point["forward"]["ours"]


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_wrong_result_gets_no_figure(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    provider(monkeypatch, lambda q, k, v: wrong * torch.nn.functional.scaled_dot_product_attention(q, k, v))
    point = last(providers=["odd"], masks=[False])["points"][0]
    for direction in attention.DIRECTIONS:
        assert "wrong" in point[direction]["odd"]["reason"]


def test_a_failing_point_is_recorded_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.shape[2] == 64:
            raise torch.OutOfMemoryError("no room for 64")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    provider(monkeypatch, attend)
    run = attention.bench_attention(
        CPU, head_dims=[32], lengths=[64, 128], tokens=128, masks=[False], providers=["odd"]
    )
    first, second = list(run)[-1]["points"]
    assert first["forward"]["odd"] == {"reason": "OutOfMemoryError: no room for 64"}
    assert second["forward"]["odd"]["seconds"] > 0


def test_scores_that_no_memory_holds_are_not_tried() -> None:
    long = Shape(head_dim=32, causal=True, length=2**19, batch=1, width=32)
    reason = attention.outcome(attention.timed, "plain", long, "forward", CPU)["reason"]
    assert reason == "MemoryError: the score matrices take 1024 GiB each"


def test_the_picture_shows_what_was_measured_and_no_more(tmp_path: Path) -> None:
    result = json.loads(json.dumps(last(providers=["ours", "cudnn"], masks=[True])))
    (picture,) = attention.plot(result, CPU, "a test", tmp_path / "attention-here.json")
    assert picture.name == "attention-here-causal.png" and picture.stat().st_size > 10_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_provider_has_a_figure_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "median_seconds", median_seconds)
    runtime = Runtime(torch.device("cuda"), "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    run = attention.bench_attention(runtime, head_dims=[64], lengths=[256], tokens=512, masks=[True])
    (point,) = list(run)[-1]["points"]
    for direction in attention.DIRECTIONS:
        assert {name: figures.get("reason") for name, figures in point[direction].items()} == dict.fromkeys(
            attention.PROVIDERS
        )


def test_times_are_seconds_and_a_copy_counts_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(64, 64)
    assert 1e-7 < median_seconds(lambda: matrix @ matrix, CPU.device, budget_ms=2) < 1
    monkeypatch.setattr("bench.timing.median_seconds", lambda function, device: function().nbytes / 1e9)
    assert copy_bandwidth(CPU.device) == pytest.approx(2e9)
