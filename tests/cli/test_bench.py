"""gpt bench-decode: figures in a file, and the same tokens as the peer's; gpt bench-train: a table."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import decoding
from engine.config import PRESETS, ModelConfig
from tests.bench.llama import FAKE, program
from tests.cli.conftest import Gpt


def test_it_leaves_figures_and_both_choose_the_same_tokens(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    small = dataclasses.replace(PRESETS["nano"], model=ModelConfig(200, 32, 2, 2, 64))
    monkeypatch.setitem(PRESETS, "nano", small)
    # In bf16, which "auto" takes where a CPU has it, rounding may decide between two tokens.
    options = ("--batch", "1,3", "--rounds", "1", "--device", "cpu", "--precision", "fp32", "--out", "figures")
    result = gpt("bench-decode", "nano", *options)
    assert result.code == 0, result.err
    (written,) = Path("figures").glob("decode-nano-*.json")
    points = json.loads(written.read_text())["points"]
    assert [point["batch"] for point in points] == [1, 3]
    for point in points:
        assert point["ours"]["same_tokens"] == 1.0
        assert point["ours"]["tokens_per_second"] > 0 and point["transformers"]["first_token_seconds"] > 0


def test_a_peer_that_fails_costs_only_itself(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*unused: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    small = dataclasses.replace(PRESETS["nano"], model=ModelConfig(200, 32, 2, 2, 64))
    monkeypatch.setitem(PRESETS, "nano", small)
    monkeypatch.setitem(decoding.PROVIDERS, "transformers", failing)
    options = ("--batch", "1", "--rounds", "1", "--device", "cpu", "--out", "figures")
    result = gpt("bench-decode", "nano", "--only", "transformers,ours", *options)
    assert result.code == 0, result.err
    assert "transformers: OutOfMemoryError: no room" in result.out
    (written,) = Path("figures").glob("decode-nano-*.json")
    (point,) = json.loads(written.read_text())["points"]
    assert point["transformers"] == {"reason": "OutOfMemoryError: no room"} and point["ours"]["same_tokens"] == 1.0


def test_llama_cpp_is_a_peer_and_sweeps_are_drawn(gpt: Gpt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = dataclasses.replace(PRESETS["nano"], model=ModelConfig(200, 32, 2, 2, 64))
    monkeypatch.setitem(PRESETS, "nano", small)
    sizes = decoding.sweeps(small.model, 1)
    assert [size.batch for size in sizes if size.sweep == "batch"] == [1, 2, 4, 8, 16, 32, 64]
    assert {size.prompt + size.new for size in sizes if size.sweep == "context"} == {64}
    monkeypatch.setattr(decoding, "sweeps", lambda *_: [sizes[0], sizes[1], sizes[-1]])
    options = ("--batch", "2", "--rounds", "1", "--device", "cpu", "--precision", "fp32", "--out", "figures")
    peer = ("--llama-cpp", str(program(tmp_path, FAKE)), "--threads", "1", "--temperature", "1", "--plot")
    result = gpt("bench-decode", "nano", "--only", "ours", *peer, *options)
    assert result.code == 0, result.err
    (written,) = Path("figures").glob("decode-nano-sampled-*.json")
    content = json.loads(written.read_text())
    assert content["temperature"] == 1 and [point["sweep"] for point in content["points"]] == [
        "",
        *["batch"] * 2,
        "context",
    ]
    assert all({"ours", "llama.cpp"} <= point.keys() for point in content["points"])
    assert "same_tokens" not in content["points"][0]["ours"] and written.with_suffix(".png").exists()
    row = next(line.split() for line in result.out.splitlines() if "llama.cpp" in line)
    assert row[:4] == ["1", "2", "llama.cpp", "500"] and row[4].endswith("x")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--threads", "999999"), "--threads is 999999; this machine has"),
        (("--llama-cpp", "."), "--llama-cpp . is not a file"),
    ],
)
def test_threads_and_peers_that_are_not_there_are_refused(gpt: Gpt, option: tuple[str, str], message: str) -> None:
    result = gpt("bench-decode", "nano", "--only", "ours", "--device", "cpu", "--precision", "fp32", *option)
    assert result.code == 2 and message in result.err


def test_training_prints_a_table_with_what_cannot_run_below(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"tokens_per_second": 1000.0, "mfu": 0.5, "start_up_seconds": 1.0, "peak_memory_bytes": 2**20}
    result = {"variants": {"ours": {**figures, "against_plain": None}}, "missing": {"plain": {"reason": "no room"}}}
    monkeypatch.setattr("bench.training.bench_training", lambda *_, **__: iter([result]))
    shown = gpt("bench-train", "nano", "--device", "cpu", "--out", "figures")
    assert shown.code == 0, shown.err
    assert "1,000" in shown.out and "plain: no room" in shown.out
    (written,) = Path("figures").glob("training-nano-*.json")
    assert json.loads(written.read_text())["variants"] == result["variants"]


def test_an_unknown_peer_gets_one_clear_message(gpt: Gpt) -> None:
    result = gpt("bench-decode", "--only", "theirs", "--device", "cpu")
    assert result.code == 2 and "--only knows no 'theirs'" in result.err
