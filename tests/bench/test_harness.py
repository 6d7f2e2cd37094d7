"""The harness: no figure for what is wrong or cannot run, a result after every point, and times that are seconds."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness, kernels, plain
from bench.harness import Case, Figures, as_it_is, compare, copy_bandwidth, median_seconds
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "fp32")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(function: Callable[[], Any], device: torch.device, **_: Any) -> float:
        function()
        return 0.5

    monkeypatch.setattr(harness, "median_seconds", once)


def last(cases: list[Case], names: list[str], **options: Any) -> Figures:
    return list(compare(cases, names, CPU, {}, **options))[-1]


def provided(case: Case, **functions: Callable[..., Any]) -> Case:
    """The case, and the one at which it is checked, with other providers."""
    changed = dataclasses.replace(case, providers={name: as_it_is(each) for name, each in functions.items()})
    if (small := case.small) is None:
        return changed
    return dataclasses.replace(changed, small=lambda: provided(dataclasses.replace(small(), small=None), **functions))


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_wrong_result_gets_no_figure(quick: None, wrong: float) -> None:
    case = kernels.attention(CPU, 32, False, 64, 2)
    odd = provided(case, odd=lambda q, k, v: wrong * F.scaled_dot_product_attention(q, k, v))
    point = last([odd], ["odd"])["points"][0]
    for direction in harness.DIRECTIONS:
        assert "wrong" in point[direction]["odd"]["reason"]


def test_a_failing_point_is_recorded_and_the_run_goes_on(quick: None) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 64:
            raise torch.OutOfMemoryError("no room for 64")
        return F.scaled_dot_product_attention(q, k, v)

    cases = [provided(kernels.attention(CPU, 32, False, n, 128 // n), odd=attend) for n in (64, 128)]
    first, second = last(cases, ["odd"])["points"]
    assert first["forward"]["odd"] == {"reason": "OutOfMemoryError: no room for 64"}
    assert second["forward"]["odd"]["seconds"] > 0


def test_a_wrong_or_failing_norm_has_a_reason_instead_of_a_figure(quick: None) -> None:
    def wrong(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        return 1.1 * F.layer_norm(x, weight.shape, weight)

    def failing(*arguments: Tensor) -> Any:
        raise RuntimeError("no such kernel")

    case = provided(kernels.norm(CPU, 4, 8, False), wrong=wrong, failing=failing)
    result = last([case], ["wrong", "failing"])
    for direction in harness.DIRECTIONS:
        found = result["points"][0][direction]
        assert found["wrong"] == {"reason": f"ArithmeticError: wrong: the relative error of the {direction} is 0.1"}
        assert found["failing"] == {"reason": "RuntimeError: no such kernel"}


def test_a_wrong_loss_and_one_that_fails_have_a_reason_and_no_figures() -> None:
    def failing(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if len(weight) == 32:
            raise torch.OutOfMemoryError("no room")
        return plain.cross_entropy(hidden, weight, targets)

    def wrong(*arguments: Tensor) -> Tensor:
        return 1.1 * plain.cross_entropy(*arguments)

    cases = [provided(kernels.loss(CPU, 16, vocab, 8), wrong=wrong, failing=failing) for vocab in (64, 32)]
    cases = [dataclasses.replace(case, finish=lambda name: {}) for case in cases]
    first, second = last(cases, ["wrong", "failing"], rounds=2)["shapes"]
    assert "the relative error is 0.1" in first["figures"]["wrong"]["reason"]
    assert first["figures"]["failing"]["seconds"] > 0
    assert second["figures"]["failing"] == {"reason": "OutOfMemoryError: no room"}


def test_what_comes_last_joins_the_points_that_are_there(quick: None) -> None:
    cases = [kernels.norm(CPU, 4, width, False) for width in (8, 12)]
    seen = [
        [list(point["forward"]) for point in result["points"]]
        for result in map(json.loads, map(json.dumps, compare(cases, ["ours"], CPU, {}, last=["torch"])))
    ]
    assert seen == [[["ours"]], [["ours"], ["ours"]], [["ours", "torch"], ["ours"]], [["ours", "torch"]] * 2]


def test_the_picture_shows_what_was_measured_and_no_more(quick: None, tmp_path: Path) -> None:
    result = json.loads(json.dumps(last([kernels.attention(CPU, 32, True, 64, 2)], ["ours", "cudnn"])))
    picture = tmp_path / "attention-here-causal.png"
    harness.plot(result["points"], "head_dim", "length", "flops_per_second", 1e-9, "a test", "GFLOP/s", picture)
    assert [picture] == list(tmp_path.glob("*")) and picture.stat().st_size > 10_000


def test_times_are_seconds_and_a_copy_counts_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(64, 64)
    assert 1e-7 < median_seconds(lambda: matrix @ matrix, CPU.device) < 1
    monkeypatch.setattr(harness, "median_seconds", lambda function, device: function().nbytes / 1e9)
    assert copy_bandwidth(CPU.device) == pytest.approx(2e9)


def test_sigterm_ends_what_a_benchmark_has_started() -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, harness.ending_together():
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        child.start()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    child.join(10)
    assert end.value.code == 143 and child.exitcode == -signal.SIGKILL and signal.getsignal(signal.SIGTERM) is earlier
