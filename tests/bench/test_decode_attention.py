"""The decode benchmark: bytes are those of the cache, no figure for what is wrong, another cache at every call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import decode_attention as bench
from bench.decode_attention import Shape
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "fp32")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench, "BYTES_BETWEEN", 2**20)
    monkeypatch.setattr(bench, "median_seconds", lambda function, device: function().numel() / 1e9)


def points(**options: Any) -> list[dict[str, Any]]:
    sizes: dict[str, Any] = {"head_dims": [128], "batches": [1, 2], "keys": [32, 64]}
    return list(bench.bench_decode_attention(CPU, **{**sizes, **options}))[-1]["points"]


def test_every_provider_that_runs_here_is_right_and_has_a_figure() -> None:
    found = points(providers=["ours", "paged", "plain", "flash", "cudnn"])
    assert [(each["group"], each["batch"], each["keys"]) for each in found] == [
        (group, batch, keys) for group in (1, 4) for batch in (1, 2) for keys in (32, 64)
    ]
    for each in found:
        # Keys and values, fp32: of all 16 heads, or of the 4 that groups of 4 share.
        assert each["cache_bytes"] == 2 * each["batch"] * each["keys"] * 2048 // each["group"] * 4
        for name in ("ours", "paged", "plain", "flash"):
            figures = each[name]
            assert figures["bytes_per_second"] == pytest.approx(each["cache_bytes"] / figures["seconds"])
            assert figures["share"] == pytest.approx(figures["bytes_per_second"] / 1e9)
        assert "RuntimeError" in each["cudnn"]["reason"]


def test_a_wrong_result_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def wrong(shape: Shape, device: torch.device) -> Iterator[Callable[..., Tensor]]:
        yield lambda q, k, v: 1.01 * q

    monkeypatch.setitem(bench.PROVIDERS, "wrong", wrong)
    assert all("wrong" in each["wrong"]["reason"] for each in points(providers=["wrong"]))


def test_a_cache_is_read_again_only_after_many_others(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    @contextmanager
    def spy(shape: Shape, device: torch.device) -> Iterator[Callable[..., Any]]:
        yield lambda q, k, v: read.append(k.data_ptr())

    def calls(function: Callable[[], Any], device: torch.device) -> float:
        for _ in range(10):
            function()
        return 1.0

    monkeypatch.setitem(bench.PROVIDERS, "spy", spy)
    monkeypatch.setattr(bench, "seconds_in_a_row", calls)
    shape = Shape(1, 16, 128, 1)
    bench.timed("spy", shape, CPU, 1e9)
    again = read.index(read[0], 1)
    assert (again - 1) * shape.cache_bytes(4) >= 2**20 and len(set(read)) == again


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_ours_has_a_figure_dense_and_paged() -> None:
    runtime = Runtime(torch.device("cuda"), "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    run = bench.bench_decode_attention(runtime, head_dims=[128], groups=[4], batches=[1], keys=[4096])
    (point,) = list(run)[-1]["points"]
    for name in ("ours", "paged", "plain"):
        assert "reason" not in point[name], point[name]
