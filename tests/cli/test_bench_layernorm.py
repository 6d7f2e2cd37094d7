"""gpt bench-layernorm: a table, a JSON and a picture; and errors that say what to do."""

import json
from pathlib import Path

import pytest

from bench import layernorm
from cli.bench_layernorm import bench_layernorm
from engine.errors import InputError


def test_it_prints_a_table_and_writes_json_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layernorm, "copy_bandwidth", lambda device: 1e9)
    bench_layernorm("8", 4, "ours,torch", "cpu", "fp32", tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("forward") == printed.count("backward") == 2
    (path,) = tmp_path.glob("layernorm-*.json")
    result = json.loads(path.read_text())
    assert [(point["width"], point["residual"]) for point in result["points"]] == [(8, False), (8, True)]
    assert path.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize(("widths", "only"), [("8,no", "ours"), ("8", "ours,liger")])
def test_what_it_does_not_know_is_named(widths: str, only: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"8,no|liger"):
        bench_layernorm(widths, 4, only, "cpu", "fp32", tmp_path)
