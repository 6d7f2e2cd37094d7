"""llama.cpp as a peer: a program that prints as llama-batched-bench does is timed, and any other is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from bench import decoding
from bench import llama_cpp as peer
from bench.decoding import Size, bench_decoding, draw
from engine.config import ModelConfig
from engine.errors import InputError
from engine.model import GPT
from engine.runtime import Runtime
from tests.bench.llama import FAKE, program

CONFIG = ModelConfig(200, 32, 2, 2, 64)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "copy_bandwidth", lambda device: 1e9)


def test_it_takes_turns_on_the_same_sizes_and_threads(tmp_path: Path) -> None:
    fake, sizes = program(tmp_path, FAKE), [Size(1, 3, 8, 48, long=50), Size(1, 1, 32, 32, sweep="batch")]
    machine = Runtime(torch.device("cpu"), "fp32")
    *_, result = bench_decoding(CONFIG, machine, sizes, providers=["ours"], rounds=1, program=fake)
    first, second = result["points"]
    assert first["llama.cpp"]["tokens_per_second"] == pytest.approx(500)
    assert first["llama.cpp"]["first_token_seconds"] == pytest.approx(0.024)
    assert first["llama.cpp"]["long_first_token_seconds"] == pytest.approx(0.150)
    assert first["ours"]["long_first_token_seconds"] > 0 and first["ours"]["same_tokens"] == 1
    assert "long_first_token_seconds" not in second["llama.cpp"] and second["ours"]["tokens_per_second"] > 0
    calls = [json.loads(line) for line in fake.with_suffix(".calls").read_text().splitlines()]
    assert {("8", "1,47,1", "3"), ("50", "1,1,1", "3"), ("32", "1,31,1", "1")} <= {
        (call["-npp"], call["-ntg"], call["-npl"]) for call in calls
    }
    # Its own warm-up of 16 tokens has to fit.
    assert all(int(call["-c"]) >= 16 and call["-t"] == call["-tb"] == "1" for call in calls)
    assert not Path(calls[0]["-m"]).parent.exists()


def test_int8_is_q8_0_and_a_step_then_reads_a_byte_for_a_weight(tmp_path: Path) -> None:
    kinds: list[str] = []
    real = peer.gguf.write

    def write(model: GPT, path: Path, precision: str) -> None:
        real(model, path, precision)
        kinds.extend(each.tensor_type.name for each in gguf.GGUFReader(path).tensors if len(each.shape) == 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer.gguf, "write", write)
        read = []
        for precision in ("fp32", "int8"):
            machine, size = Runtime(torch.device("cpu"), precision), Size(1, 1, 8, 2)
            options: Any = {"providers": ["ours"], "rounds": 1, "program": program(tmp_path, FAKE)}
            (result,) = bench_decoding(CONFIG, machine, [size], **options)
            read.append(result["points"][0]["bytes_per_step"])
    assert set(kinds[:10]) == {"F32"} and set(kinds[10:]) == {"Q8_0"} and len(kinds) == 20
    assert read[0] - read[1] == 3 * CONFIG.matmul_parameters


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (FAKE, 0o644, "cannot be started: Permission denied"),
        ("no program", 0o755, "cannot be started: Exec format error"),
        ("#!/bin/sh\necho unknown argument >&2; exit 3", 0o755, "ended with 3 and said: unknown argument"),
        ("#!/bin/sh\necho hello", 0o755, "printed no t_pp and t_tg as llama-batched-bench does; it .* said: hello"),
        ("#!/bin/sh\nexit 0", 0o755, "said: nothing"),
        ("#!/bin/sh\necho '{}'; echo '{\"t_pp\": 1, \"t_tg\": null}'", 0o755, "printed no t_pp and t_tg"),
        ("#!/bin/sh\necho '{}'; echo '{\"t_pp\": 1, \"t_tg\": 0}'", 0o755, "printed no t_pp and t_tg"),
        ("#!/bin/sh\necho '{}'; echo '{nothing'", 0o755, "printed no t_pp and t_tg"),
    ],
)
def test_what_is_not_the_program_is_refused(
    text: str, mode: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "TRIES", 2)
    with (
        pytest.raises(InputError, match=message),
        peer.llama_cpp(program(tmp_path, text, mode), GPT(CONFIG), "fp32"),
    ):
        pass


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="is not a file; it takes the path of"),
        peer.llama_cpp(tmp_path, GPT(CONFIG), "fp32"),
    ):
        pass


def test_the_picture_has_a_panel_for_each_sweep(tmp_path: Path) -> None:
    figures = {"tokens_per_second": 9.0}
    points = [
        {
            "threads": 1,
            "batch": batch,
            "prompt": prompt,
            "new": 32,
            "sweep": sweep,
            "ours": figures,
            "llama.cpp": {"reason": "none"},
        }
        for sweep, batch, prompt in (("batch", 1, 32), ("batch", 2, 32), ("context", 8, 32), ("context", 8, 64))
    ]
    draw(points, "a test", tmp_path / "decode.png")
    assert (tmp_path / "decode.png").stat().st_size > 10_000
