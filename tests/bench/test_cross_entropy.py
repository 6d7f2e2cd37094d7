"""The cross-entropy benchmark: every loss has figures or a reason, and a wrong one has none."""

import json
from pathlib import Path

import pytest
import torch

from bench import cross_entropy
from cli.bench_cross_entropy import bench_cross_entropy
from engine.errors import InputError
from engine.runtime import Runtime

PEAK_MEMORY = cross_entropy.peak_memory


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.SHAPES, "cpu", ((64, 8), (32, 8)))
    monkeypatch.setattr(cross_entropy, "peak_memory", lambda name, size, runtime: 100 if name == "ours" else 1000)


def test_it_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_cross_entropy(None, 16, 2, "cpu", "bf16", tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("1/10.0") == 2 and printed.count("half") == 2
    (path,) = tmp_path.glob("cross-entropy-*.json")
    shapes = json.loads(path.read_text())["shapes"]
    assert [shape["vocab"] for shape in shapes] == [64, 32]
    for shape in shapes:
        for figures in shape["figures"].values():
            assert min(figures[kind] for kind in ("relative_error", "seconds", "forward_seconds")) > 0


def test_one_vocabulary_alone_or_none_that_there_is(tmp_path: Path) -> None:
    bench_cross_entropy("32", 16, 1, "cpu", "fp32", tmp_path)
    (written,) = tmp_path.glob("*.json")
    assert [shape["vocab"] for shape in json.loads(written.read_text())["shapes"]] == [32]
    with pytest.raises(InputError, match="--vocab is 5"):
        bench_cross_entropy("5", 16, 1, "cpu", "fp32", tmp_path)


def test_a_wrong_loss_and_one_that_fails_have_a_reason_and_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(torch.device("cpu"), "fp32")

    def failing(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(weight) == 32:
            raise torch.OutOfMemoryError("no room")
        return cross_entropy.plain(hidden, weight, targets)

    group = {"wrong": lambda *arguments: 1.1 * cross_entropy.plain(*arguments), "failing": failing}
    monkeypatch.setattr(cross_entropy, "losses", lambda runtime: [group])
    run = cross_entropy.bench_cross_entropy(runtime, shapes=[(64, 8), (32, 8)], tokens=16, rounds=2)
    first, second = list(run)[-1]["shapes"]
    assert "the relative error is 0.1" in first["figures"]["wrong"]["reason"]
    assert first["figures"]["failing"]["seconds"] > 0
    assert second["figures"]["failing"] == {"reason": "OutOfMemoryError: no room"}


def test_the_peak_is_what_a_pass_adds_to_its_arguments() -> None:
    runtime, size = Runtime(torch.device("cpu"), "fp32"), (1024, 16384, 16)
    logits = 4 * size[0] * size[1]
    assert 1.5 * logits < PEAK_MEMORY("plain", size, runtime) < 4 * logits
