"""The comparisons of kernels: what is counted, which providers run and are right, and why others cannot run."""

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import harness, kernels
from bench.harness import Case, Figures, compare
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "fp32")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def half_precision() -> Runtime:
    return Runtime(torch.device("cuda"), "bf16" if torch.cuda.is_bf16_supported() else "fp16")


def stand_in(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Any], float]) -> None:
    """Put a function of what is timed in place of the clock."""
    monkeypatch.setattr(harness, "median_seconds", lambda function, device, **_: seconds(function()))


def last(cases: list[Case], names: list[str], runtime: Runtime = CPU) -> Figures:
    return list(compare(cases, names, runtime, {}))[-1]


def test_flops_are_those_of_the_products() -> None:
    full, causal = (kernels.attention(CPU, 64, mask, 512, 2, 1024) for mask in (False, True))
    assert full.place["heads"] == 16
    forward = full.rates("forward", 1.0)["flops_per_second"]
    assert forward == 4 * 2 * 16 * 512 * 512 * 64
    assert full.rates("backward", 1.0)["flops_per_second"] == 2.5 * forward
    assert causal.rates("forward", 1.0)["flops_per_second"] == forward / 2


def test_every_attention_that_runs_here_is_right_and_has_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    # The stand-in for a clock counts what the function gives: out, or dq, dk and dv.
    stand_in(monkeypatch, lambda out: (1 if isinstance(out, Tensor) else len(out)) / 1000)
    names = ["ours", "packed", "plain", "flash"]
    result = last([kernels.attention(CPU, 32, causal, 64, 2) for causal in (True, False)], names)
    assert [(point["causal"], point["batch"], point["heads"]) for point in result["points"]] == [
        (True, 2, 64),
        (False, 2, 64),
    ]
    for verdicts, point in zip(result["checks"], result["points"], strict=True):
        for direction, outputs in (("forward", 1), ("backward", 3)):
            for name in names:
                assert 0 < verdicts[direction][name]["relative_error"] < 1e-4
                assert point[direction][name]["seconds"] == outputs / 1000


def test_what_cannot_run_here_is_recorded_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda out: 0.5)
    point = last([kernels.attention(CPU, 32, True, 64, 2)], ["ours", "cudnn"])["points"][0]
    assert "RuntimeError" in point["forward"]["cudnn"]["reason"]
    assert "seconds" in point["forward"]["ours"]


def test_scores_that_no_memory_holds_are_not_tried() -> None:
    # Nothing is drawn: so many queries would take long.
    long = dataclasses.replace(kernels.attention(CPU, 32, True, 2**19, 1, 32), draw=lambda: ([], []))
    reason = harness.outcome(harness.timed, long, "plain", "forward", CPU)["reason"]
    assert reason == "MemoryError: the score matrices take 1024 GiB each"


@pytest.mark.gpu
@GPU
def test_on_a_gpu_every_attention_has_a_figure_both_ways() -> None:
    runtime, names = half_precision(), list(kernels.ATTENTION)
    (point,) = last([kernels.attention(runtime, 64, True, 256, 2)], names, runtime)["points"]
    for direction in harness.DIRECTIONS:
        assert {name: figures.get("reason") for name, figures in point[direction].items()} == dict.fromkeys(names)


def test_every_decode_attention_that_runs_here_is_right_and_has_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda out: out.numel() / 1e9)
    monkeypatch.setattr(kernels, "BYTES_BETWEEN", 2**20)
    shapes = list(product((1, 4), (1, 2), (32, 64)))
    cases = [kernels.decode(CPU, 1e9, 128, *shape) for shape in shapes]
    found = last(cases, ["ours", "paged", "plain", "flash", "cudnn"])["points"]
    assert [(each["group"], each["batch"], each["keys"]) for each in found] == shapes
    for each in found:
        # Keys and values, fp32: of all 16 heads, or of the 4 that groups of 4 share.
        assert each["cache_bytes"] == 2 * each["batch"] * each["keys"] * 2048 // each["group"] * 4
        for name in ("ours", "paged", "plain", "flash"):
            figures = each[name]
            assert figures["bytes_per_second"] == pytest.approx(each["cache_bytes"] / figures["seconds"])
            assert figures["share"] == pytest.approx(figures["bytes_per_second"] / 1e9)
        assert "RuntimeError" in each["cudnn"]["reason"]


def test_a_wrong_decode_attention_gets_no_figure() -> None:
    def wrong(case: Case) -> Case:
        return dataclasses.replace(case, providers={"wrong": harness.as_it_is(lambda q, k, v: 1.01 * q)})

    cases = [kernels.decode(CPU, 1e9, 128, *shape) for shape in product((1, 4), (1, 2), (32, 64))]
    cases = [dataclasses.replace(wrong(case), small=partial(wrong, case.small())) for case in cases if case.small]
    assert all("wrong" in each["wrong"]["reason"] for each in last(cases, ["wrong"])["points"])


def test_a_cache_is_read_again_only_after_many_others(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def calls(function: Callable[[], Any], device: torch.device, **options: Any) -> float:
        for _ in range(10):
            function()
        return 1.0

    monkeypatch.setattr(harness, "median_seconds", calls)
    monkeypatch.setattr(kernels, "BYTES_BETWEEN", 2**20)
    case = kernels.decode(CPU, 1e9, 128, 1, 1, 16)
    spy = dataclasses.replace(case, providers={"spy": harness.as_it_is(lambda q, k, v: read.append(k.data_ptr()))})
    harness.timed(spy, "spy", "", CPU)
    again = read.index(read[0], 1)
    assert (again - 1) * case.place["cache_bytes"] >= 2**20 and len(set(read)) == again


@pytest.mark.gpu
@GPU
def test_on_a_gpu_our_decode_attention_has_a_figure_dense_and_paged() -> None:
    runtime, names = half_precision(), ["ours", "paged", "plain"]
    (point,) = last([kernels.decode(runtime, 1e12, 128, 4, 1, 4096)], names, runtime)["points"]
    for name in names:
        assert "reason" not in point[name], point[name]


def test_every_width_of_a_norm_is_timed_alone_and_with_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda out: 0.5)
    shapes = [(8, False), (8, True), (12, False), (12, True)]
    result = last([kernels.norm(CPU, 4, *shape) for shape in shapes], ["ours", "torch"])
    assert [(point["width"], point["residual"]) for point in result["points"]] == shapes
    tensor = 4 * 8 * 4
    moved = {("forward", False): 2, ("forward", True): 4, ("backward", False): 3, ("backward", True): 4}
    for point in result["points"][:2]:
        for direction in harness.DIRECTIONS:
            for name in ("ours", "torch"):
                figures = point[direction][name]
                assert figures["bytes_per_second"] == moved[direction, point["residual"]] * tensor / 0.5
                assert figures["share"] == 1 and figures["relative_error"] < 1e-5


def test_the_peak_of_a_loss_is_what_a_pass_adds_to_its_arguments() -> None:
    logits = 4 * 1024 * 16384
    assert 1.5 * logits < kernels.loss(CPU, 1024, 16384, 16).finish("plain")["peak_bytes"] < 4 * logits
