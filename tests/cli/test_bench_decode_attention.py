"""gpt bench-decode-attention: figures in a file, or one sentence on what was asked for wrongly."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Gpt


def test_it_leaves_figures(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.decode_attention.BYTES_BETWEEN", 2**20)
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
def test_a_mistake_gets_one_clear_message(gpt: Gpt, options: list[str], expected: str) -> None:
    result = gpt("bench-decode-attention", *options, "--device", "cpu")
    assert result.code == 2
    assert result.err.startswith("error: ") and expected in result.err
