"""gpt bench-decode: figures in a file, and the same tokens as the peer's."""

import dataclasses
import json
from pathlib import Path

import pytest

from engine.config import PRESETS, ModelConfig
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


def test_an_unknown_peer_gets_one_clear_message(gpt: Gpt) -> None:
    result = gpt("bench-decode", "--only", "theirs", "--device", "cpu")
    assert result.code == 2 and "--only knows no 'theirs'" in result.err
