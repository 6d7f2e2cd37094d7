"""Connections that are too many, that send nothing, too slowly or too much, and what becomes of them at the end."""

import logging
import resource
import struct
import threading
import time
from collections.abc import Iterator
from socket import SO_LINGER, SOL_SOCKET, socket

import pytest

from cli.server import app, connections, guard
from engine.tokenizer import Tokenizer
from tests.cli.server.conftest import Live, live
from tests.cli.server.test_life import LONG, connect

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
COMPLETION = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALF_BODY = COMPLETION + b"Content-Length: 100\r\n\r\nhalf"


def read(client: socket, until: bytes | None = None) -> bytes:
    """Return all that comes until the connection is closed, or this has come. Raises TimeoutError, ConnectionError."""
    found = bytearray()
    while (until is None or until not in found) and (part := client.recv(2**16)):
        found += part
    return bytes(found)


@pytest.fixture
def small(tokenizer: Tokenizer) -> Iterator[Live]:
    """A server of its own, with room for three connections, of which its client has one."""
    with live(tokenizer, connections=3) as running:
        yield running


def test_whoever_sends_no_whole_request_is_closed(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0)
    monkeypatch.setattr(server.server.config, "timeout_keep_alive", 1000)
    silent, half, again, slow = (server.connect(data) for data in (b"", MODELS[:9], MODELS + MODELS[:9], MODELS[:-2]))
    end = time.monotonic() + 5
    with pytest.raises(OSError):
        while time.monotonic() < end:
            slow.sendall(b"X")
            time.sleep(0.05)
    for client in (silent, half):
        assert not read(client)
    assert b"small" in read(again)


def test_who_asks_now_and_then_stays(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 1)
    client = server.connect()
    for _ in range(5):
        client.sendall(MODELS)
        assert b"small" in read(client, b"}]}")
        time.sleep(0.5)


def test_when_all_connections_are_taken_the_next_is_told(small: Live, caplog: pytest.LogCaptureFixture) -> None:
    small.http.get("/v1/models")
    taken = [small.connect(MODELS[:9]) for _ in range(2)]
    small.until(lambda: len(small.server.server_state.connections) == 3)
    for _ in range(2):
        answer = read(small.connect(MODELS))
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"too many connections" in answer
    assert small.http.get("/v1/models").status_code == 200  # who was there before is served
    assert b"ok" in read(small.connect(HEALTH))
    assert caplog.text.count("all 3 connections are taken") == 1
    taken.pop().close()
    small.until(lambda: len(small.server.server_state.connections) == 2)
    assert b"small" in read(small.connect(MODELS), b"}]}")


def test_no_connection_is_refused_while_there_is_room(small: Live, caplog: pytest.LogCaptureFixture) -> None:
    small.http.get("/v1/models")
    for _ in range(100):
        taken = [small.connect(MODELS[:9]) for _ in range(2)]
        small.until(lambda: len(small.server.server_state.connections) == 3)
        for client in taken:
            client.close()
        small.until(lambda: len(small.server.server_state.connections) == 1)
    assert "taken" not in caplog.text


def test_health_is_told_while_the_event_loop_is_busy(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    server.worker.loop.call_soon_threadsafe(free.wait, 10)
    assert read(server.connect(HEALTH)).startswith(b"HTTP/1.1 200")
    monkeypatch.setattr(connections, "STILL_SECONDS", -1)
    assert read(server.connect(HEALTH)).startswith(b"HTTP/1.1 503")
    free.set()


def test_many_who_come_at_once_are_all_served(server: Live) -> None:
    early = [server.connect() for _ in range(3 * connections.WAITING)]
    for client in early:
        client.sendall(MODELS)
    assert all(b"small" in read(client, b"}]}") for client in early)


def test_a_greeting_that_comes_in_pieces_is_waited_for_and_then_handed_on(server: Live) -> None:
    client = server.connect(HEALTH[:12])
    time.sleep(0.02)
    client.sendall(HEALTH[12:])
    assert b"ok" in read(client)
    late, body = server.connect(HEALTH[:12]), HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    time.sleep(3 * connections.GREETING_SECONDS)
    late.sendall(body[12:])
    assert b"ok" in read(late)
    reset = server.connect(HEALTH[:12])
    reset.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()
    assert b"ok" in read(server.connect(HEALTH))


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "room"),
    [
        (1024, 2**20, 4352, 4096),
        (256, 1000, 1000, 744),
        (2**20, resource.RLIM_INFINITY, None, 4096),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 4096),
        (64, 64, None, 32),
    ],
)
def test_connections_have_room_below_the_limit_on_files(
    soft: int, hard: int, raised: int | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    assert connections.room_for_connections() == room
    assert limits == ([] if raised is None else [(raised, hard)])


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize(
    ("begin", "status"),
    [
        (COMPLETION, b"413"),
        (b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n", b"404"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: elsewhere\r\n", b"400"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n", b"400"),
    ],
)
def test_who_sends_all_before_reading_anything_sees_the_answer(
    server: Live, begin: bytes, status: bytes, close: bytes
) -> None:
    size = 4 * app.BODY_BYTES
    client = server.connect(begin + close + b"Content-Length: %d\r\n\r\n" % size)
    client.sendall(bytes(size))
    assert read(client).startswith(b"HTTP/1.1 " + status)


def test_what_is_dropped_is_bounded_in_bytes_and_time(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "DISCARD_BYTES", 2**20)
    client = server.connect(COMPLETION + b"Content-Length: 100000000\r\n\r\n")
    with pytest.raises(OSError):
        client.sendall(bytes(100_000_000))
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    assert read(server.connect(HALF_BODY)).startswith(b"HTTP/1.1 408")


def test_the_end_waits_for_answers_and_for_nothing_else(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with live(tokenizer) as ending:
        ending.paced(monkeypatch)
        clients = [ending.connect(data) for data in (b"", MODELS[:9], HALF_BODY)]
        stream = connect(ending, {**LONG, "stream": True})
        ending.until(lambda: len(ending.worker.jobs) == 1 and len(ending.server.server_state.connections) == 4)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    assert b"[DONE]" in read(stream)
    for client in clients:
        client.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_second_signal_ends_answers_with_what_they_have(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "LAST_SECONDS", 0.2)
    with live(tokenizer) as ending:
        ending.paced(monkeypatch, 0.1)
        stream = connect(ending, {**LONG, "stream": True})
        silent = connect(ending, {**LONG, "stream": True, "n": 8, "logprobs": 5}, buffer=1024)
        ending.until(lambda: ending.worker.generated_tokens > 3)
        for _ in range(3):
            ending.worker.loop.call_soon_threadsafe(ending.server.handle_exit, 15, None)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    text = read(stream)
    assert b"[DONE]" in text and b'"finish_reason":"length"' in text and text.count(b"data:") < 40
    silent.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
