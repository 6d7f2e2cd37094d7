"""Clients that go, clients that do not read, too many of them, a model that fails, and the end."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from cli.server import worker
from engine import checkpoint
from engine.config import BudgetConfig, ModelConfig, Recipe
from engine.model import GPT
from engine.run import Run
from engine.tokenizer import Tokenizer
from tests.cli.conftest import Gpt
from tests.cli.server.conftest import Live, live

LONG: dict[str, Any] = {"model": "small", "prompt": "secret fox", "max_tokens": 80, "temperature": 0}


def connect(server: Live, body: dict[str, Any], *, buffer: int | None = None) -> socket.socket:
    """A client that has asked and does not read."""
    address = httpx.URL(server.url)
    client = socket.socket()
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect((address.host, address.port))
    content = json.dumps(body).encode()
    fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    client.sendall(f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n".encode() + content)
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_generation_stops_when_the_client_is_gone(server: Live, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    server.paced(monkeypatch, 0.05)
    client = connect(server, {**LONG, "stream": stream, "n": 3})
    server.until(lambda: len(server.worker.batcher.running) == 3)
    before = server.worker.generated_tokens
    client.close()
    server.until(server.idle)
    assert server.worker.generated_tokens - before < 3 * 40


def test_one_who_waits_and_goes_leaves_the_queue(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    server.paced(monkeypatch, 0.05)
    busy = [connect(server, {**LONG, "n": 4}), connect(server, LONG)]
    server.until(lambda: len(server.worker.batcher.waiting) == 1)
    busy[1].close()
    server.until(lambda: len(server.worker.batcher.waiting) == 0)
    assert len(server.worker.batcher.running) == 4
    busy[0].close()
    server.until(server.idle)


def test_who_does_not_read_keeps_nobody_waiting(server: Live) -> None:
    # More than the sockets between them hold.
    with connect(server, {**LONG, "stream": True, "n": 8, "logprobs": 5}, buffer=1024) as idle:
        assert server.post("completions", LONG).json()["usage"]["completion_tokens"] == 80
        server.until(lambda: server.worker.batcher.idle)
        assert len(server.worker.jobs) == 1
        answer = bytearray()
        while b"[DONE]" not in answer:
            answer += idle.recv(2**16)
    assert answer.count(b'"finish_reason":"length"') == 8
    server.until(server.idle)


def test_a_full_server_says_so_and_when_to_come_again(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    server.paced(monkeypatch)
    with connect(server, {**LONG, "n": 12}):
        server.until(lambda: len(server.worker.jobs) == 1)
        answer = server.post("completions", LONG)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        with pytest.raises(openai.RateLimitError):
            server.openai.completions.create(**LONG)
    server.until(server.idle)
    assert server.post("completions", LONG).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_when_time_is_up_an_answer_ends_with_what_there_is(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with live(tokenizer, seconds=0.3) as server:
        server.paced(monkeypatch, 0.02)
        answer: Any = server.openai.completions.create(**LONG, stream=stream)
        *_, last = answer if stream else [answer]
        assert last.choices[0].finish_reason == "length"
        assert 0 < server.worker.generated_tokens < 80
        server.until(server.idle)


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError(LONG["prompt"])


def test_when_the_model_fails_nobody_waits_for_ever(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with live(tokenizer, slots=2) as server:
        server.paced(monkeypatch)
        stream = server.openai.completions.create(**LONG, stream=True)
        next(iter(stream))
        answers: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: answers.append(server.post("completions", {**LONG, "n": 3})))
        waiting.start()
        server.until(lambda: len(server.worker.jobs) == 2)
        monkeypatch.setattr(server.worker.batcher, "step", fail)
        monkeypatch.setattr(server.worker.batcher, "probe", fail)
        with pytest.raises(openai.APIError, match="must be started again"):
            list(stream)
        waiting.join()
        assert answers[0].status_code == 500 and answers[0].json()["error"]["type"] == "server_error"
        assert server.http.get("/health").status_code == 503
        health = server.http.get("/openapi.json").json()["paths"]["/health"]["get"]
        assert health["responses"].keys() == {"200", "503"}
        assert server.post("completions", LONG).status_code == 503
    assert "RuntimeError" in caplog.text and LONG["prompt"] not in caplog.text


def test_a_request_on_which_the_model_fails_fails_alone(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = server.post("completions", LONG).json()["choices"][0]["text"]
    server.paced(monkeypatch)
    batcher = server.worker.batcher
    arrived = batcher._arrived

    def failing(chosen: Any) -> Any:
        if any(each.request.sampling.top_k == 7 and each.length > 20 for each in chosen.rows):
            fail()
        return arrived(chosen)

    monkeypatch.setattr(batcher, "_arrived", failing)
    going_on = server.openai.completions.create(**LONG, stream=True)
    first = next(iter(going_on))
    bad = {**LONG, "top_k": 7}
    answer = server.post("completions", bad)
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "The model has failed on this request."
    with pytest.raises(openai.APIError, match="on this request"):
        list(server.openai.completions.create(**LONG, extra_body={"top_k": 7}, stream=True))
    texts = [chunk.choices[0].text for chunk in (first, *going_on)]
    assert "".join(texts) == wanted
    server.until(server.idle)
    assert server.http.get("/health").status_code == 200
    assert server.post("completions", LONG).json()["choices"][0]["text"] == wanted


def test_a_prompt_that_cannot_be_measured_costs_nobody_else(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "read_prompt", fail)
    assert server.post("completions", {**LONG, "echo": True, "logprobs": 1, "max_tokens": 0}).status_code == 500
    assert server.post("completions", LONG).status_code == 200
    server.until(server.idle)


def test_logs_hold_no_word_of_the_conversation(server: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "gpt.serve")
    text = server.post("completions", {**LONG, "user": "secret"}).json()["choices"][0]["text"]
    server.post("completions", {**LONG, "secret": 1})
    server.http.get("/v1/models?secret=1")
    lines = [record.getMessage() for record in caplog.records if record.name == "gpt.serve"]
    assert [line.rsplit(" ", 2)[0] for line in lines] == [
        "POST /v1/completions 200",
        "POST /v1/completions 400",
        "GET /v1/models 200",
    ]
    assert "secret" not in "".join(lines) and text not in "".join(lines)


def figures(server: Live) -> dict[str, float]:
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    spell = "{{{}}}".format
    return {
        each.name
        + (spell(",".join(f'{name}="{each.labels[name]}"' for name in each.labels)) if each.labels else ""): each.value
        for each in samples
    }


def test_metrics_count_what_happened(server: Live) -> None:
    before = figures(server)
    server.post("completions", LONG)
    server.http.get("/no/such/path")
    after = figures(server)
    for name, more in (
        ("gpt_generated_tokens_total", 80),
        ("gpt_first_token_seconds_count", 1),
        ("gpt_queue_seconds_count", 1),
        ("gpt_request_seconds_count", 1),
        ('gpt_request_seconds_bucket{le="+Inf"}', 1),
        ('gpt_requests_total{path="/v1/completions",status="200"}', 1),
    ):
        assert after[name] - before.get(name, 0) == more
    assert after["gpt_texts_running"] == after["gpt_texts_waiting"] == 0
    # Of those that a first step brings along, nobody knows when the model wrote them.
    assert 80 - 17 <= after["gpt_token_seconds_count"] - before["gpt_token_seconds_count"] < 80
    assert not any("/no/such" in name for name in after)


def test_latencies_are_those_of_the_model(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    server.paced(monkeypatch, 0.03)
    before = figures(server)
    assert server.post("completions", {**LONG, "n": 5, "max_tokens": 9}).status_code == 200
    after = {name: value - before[name] for name, value in figures(server).items()}
    # Each token takes 0.03 s at least; one text of the five waits until another one has its nine.
    assert after["gpt_token_seconds_count"] == 5 * 8 and after['gpt_token_seconds_bucket{le="0.025"}'] == 0
    assert after["gpt_queue_seconds_count"] == 5 and after['gpt_queue_seconds_bucket{le="0.25"}'] <= 4
    assert after["gpt_first_token_seconds_count"] == after["gpt_request_seconds_count"] == 1
    assert after["gpt_request_seconds_sum"] > 2 * 9 * 0.03


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "::", "--api-key", ""], "--api-key is empty"),
        (["--host", "0.0.0.0", "--insecure"], "not a run"),
        ([], "not a run"),
    ],
)
def test_others_are_not_let_in_without_a_key(gpt: Gpt, arguments: list[str], expected: str) -> None:
    result = gpt("serve", "nowhere", *arguments)
    assert result.code == 2 and expected in result.err


def test_told_to_end_it_finishes_what_it_has_begun_and_takes_no_more(
    small_config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    run = Run(tmp_path / "small")
    run.write_recipe(Recipe(name="small", model=small_config, budget=BudgetConfig(steps=1)))
    tokenizer.save(run.tokenizer)
    torch.manual_seed(0)
    checkpoint.save(run.checkpoints, 1, {"model": GPT(small_config).state_dict()}, {"state": {"step": 1}})
    command = [sys.executable, "-m", "cli", "serve", str(run.path), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "GPT_API_KEY": "secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "a base model" in process.stdout.readline()
        url = process.stdout.readline().strip()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        stream = client.completions.create(model="small", prompt="Once", max_tokens=40, temperature=0, stream=True)
        chunks = iter(stream)
        texts = [next(chunks)]
        process.send_signal(signal.SIGTERM)
        texts += chunks
        assert texts[-1].choices[0].finish_reason
        assert process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert "Once" not in process.stderr.read()
