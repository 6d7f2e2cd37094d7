"""gpt bench-layernorm, bench-cross-entropy and bench-decode-attention: figures in a file, and clear errors."""

import json
from pathlib import Path

import pytest

from bench import harness, kernels
from cli.bench_kernels import bench_cross_entropy, bench_layernorm
from cli.options import BenchOptions
from engine.errors import InputError
from tests.cli.conftest import Gpt


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setitem(kernels.SHAPES, "cpu", ((64, 8), (32, 8)))
    monkeypatch.setattr(harness, "added_memory", lambda work, *_, **__: 100 if work.args[0] == "ours" else 1000)
    monkeypatch.setattr(kernels, "BYTES_BETWEEN", 2**20)


@pytest.mark.parametrize("rms", [False, True])
def test_layernorm_prints_a_table_and_writes_json_and_a_picture(
    rms: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_layernorm("8", 4, "ours,torch", rms, on=BenchOptions("cpu", "fp32", tmp_path))
    printed = capsys.readouterr().out
    assert printed.count("forward") == printed.count("backward") == 2
    (path,) = tmp_path.glob("rmsnorm-*.json" if rms else "layernorm-*.json")
    result = json.loads(path.read_text())
    assert [(point["width"], point["residual"]) for point in result["points"]] == [(8, False), (8, True)]
    assert path.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize(("widths", "only"), [("8,no", "ours"), ("8", "ours,liger")])
def test_what_layernorm_does_not_know_is_named(widths: str, only: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"8,no|liger"):
        bench_layernorm(widths, 4, only, on=BenchOptions("cpu", "fp32", tmp_path))


def test_cross_entropy_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_cross_entropy(None, 16, 2, on=BenchOptions("cpu", "bf16", tmp_path))
    printed = capsys.readouterr().out
    assert printed.count("1/10.0") == 2 and printed.count("half") == 2
    (path,) = tmp_path.glob("cross-entropy-*.json")
    shapes = json.loads(path.read_text())["shapes"]
    assert [shape["vocab"] for shape in shapes] == [64, 32]
    for shape in shapes:
        for figures in shape["figures"].values():
            assert min(figures[kind] for kind in ("relative_error", "seconds", "forward_seconds")) > 0


def test_one_vocabulary_alone_or_none_that_there_is(tmp_path: Path) -> None:
    bench_cross_entropy("32", 16, 1, on=BenchOptions("cpu", "fp32", tmp_path))
    (written,) = tmp_path.glob("*.json")
    assert [shape["vocab"] for shape in json.loads(written.read_text())["shapes"]] == [32]
    with pytest.raises(InputError, match="--vocab is 5"):
        bench_cross_entropy("5", 16, 1, on=BenchOptions("cpu", "fp32", tmp_path))


def test_decode_attention_leaves_figures(gpt: Gpt) -> None:
    few = ("--head-dim", "128", "--group", "4", "--batch", "1", "--keys", "32,64", "--only", "ours,plain,cudnn")
    result = gpt("bench-decode-attention", *few, "--device", "cpu", "--out", "figures")
    assert result.code == 0, result.err
    for part in ("ours is the torch backend", "cudnn: ", "D 128 group 4 batch 1 keys 64: ours "):
        assert part in result.out
    (written,) = Path("figures").glob("decode-attention-*.json")
    content = json.loads(written.read_text())
    assert content["versions"]["torch"] and content["copy_bytes_per_second"] > 0
    assert [point["keys"] for point in content["points"]] == [32, 64]
    assert content["points"][1]["ours"]["bytes_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--head-dim", "96"], "--head-dim 96"),
        (["--group", "3"], "--group 3"),
        (["--keys", "100"], "multiples of 16"),
        (["--batch", "many"], "whole numbers"),
        (["--only", "ours,theirs"], "cudnn"),
    ],
)
def test_a_mistake_in_decode_attention_gets_one_clear_message(gpt: Gpt, options: list[str], expected: str) -> None:
    result = gpt("bench-decode-attention", *options, "--device", "cpu")
    assert result.code == 2
    assert result.err.startswith("error: ") and expected in result.err
