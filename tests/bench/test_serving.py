"""The load on the server: every stream is checked, and a fault is told from the rest."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from bench.serving import RefusedError, bench_serving, follow, request
from engine import checkpoint
from engine.config import BudgetConfig, ModelConfig, Recipe
from engine.errors import InputError
from engine.model import GPT
from engine.run import Run
from engine.tokenizer import Tokenizer


def event(text: str, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"text": text, "finish_reason": finish}], "usage": None})


def usage(tokens: int) -> str:
    return json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})


STREAMS = {
    "good": ([event("a"), event("b"), event("", "length"), usage(2), "[DONE]"], None),
    "lost": ([event("a"), event("", "length"), usage(2), "[DONE]"], "1 tokens of 2"),
    "cut": ([event("a"), event("", "length"), usage(1)], "[DONE] False"),
    "no end": ([event("a"), usage(1), "[DONE]"], "finish None"),
    "more": ([event("a"), event("", "length"), event("b"), usage(1), "[DONE]"], "after the end"),
    "failed": ([event("a"), json.dumps({"error": {"message": "it broke"}})], "it broke"),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_does_not_end_well_is_a_fault(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, fault = STREAMS[kind]

    async def events(port: int, body: object) -> AsyncIterator[str]:
        for each in data:
            yield each

    monkeypatch.setattr("bench.serving.events", events)
    stream = asyncio.run(follow(0, request(0)))
    assert (stream.fault is None) if fault is None else (stream.fault is not None and fault in stream.fault)
    assert fault or stream.text == "ab"


def test_who_is_refused_by_a_full_server_has_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async def events(port: int, body: object) -> AsyncIterator[str]:
        raise RefusedError
        yield ""

    monkeypatch.setattr("bench.serving.events", events)
    stream = asyncio.run(follow(0, request(0)))
    assert stream.refused and stream.fault is None


def test_a_server_that_does_not_begin_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--api-key"):
        bench_serving(tmp_path, clients=1, seconds=1, options=["--host", "0.0.0.0"])


def test_many_clients_are_served_and_measured(small_config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    run = Run(tmp_path / "small")
    run.write_recipe(Recipe(name="small", model=small_config, budget=BudgetConfig(steps=1)))
    tokenizer.save(run.tokenizer)
    torch.manual_seed(0)
    checkpoint.save(run.checkpoints, 1, {"model": GPT(small_config).state_dict()}, {"state": {"step": 1}})
    result = bench_serving(run.path, clients=4, seconds=1.5, options=["--device", "cpu"])
    assert result["faults"] == [] and result["different_alone"] == 0 < result["asked_again_alone"]
    assert result["refused"] == 0 < result["health_seconds"]["asked"]
    told = result["mean_seconds_told_by_the_server"]
    assert 0 < told["token_seconds"] < told["request_seconds"] > told["first_token_seconds"] > 0
    assert 0 < result["health_seconds"]["p99"] <= result["health_seconds"]["worst"] < 10
    assert result["tokens"] > 0 < result["against_one_client"] and result["memory_bytes"]["end"] > 0
