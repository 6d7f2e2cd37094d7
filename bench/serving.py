"""The server under load: many clients at once, each reading its stream, and every stream checked.

The server runs in a process of its own; clients speak HTTP/1.0 over plain sockets, so that they take little from it.
"""

import asyncio
import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from bench.harness import ending_together
from engine.errors import InputError

MODEL = "model"
PROMPTS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "Tim and his dog went to the park.",
    "The sun was warm, and",
    "There was a brave rabbit who",
)
MAX_TOKENS = (32, 128)
# One in this many streams is requested again, alone, when the load is over.
SAMPLE_EVERY = 16
SAMPLES = 32
# What the server's /metrics measure, behind gpt_.
HISTOGRAMS = ("queue_seconds", "first_token_seconds", "token_seconds", "request_seconds")
# Seconds between two looks at the server's health, and how long one may take.
WATCH_EVERY = 0.02
WATCH_PATIENCE = 10.0


class RefusedError(Exception):
    """The server is full: it answered 429 or 503."""


@dataclass
class Stream:
    """One request and what came of it. `times`: when each token came, in seconds; `fault`: what was wrong with it.

    A full server may refuse it: that is no fault.
    """

    body: dict[str, Any]
    begin: float
    text: str = ""
    times: list[float] = field(default_factory=list)
    fault: str | None = None
    refused: bool = False


def request(number: int) -> dict[str, Any]:
    generator = random.Random(number)
    return {
        "model": MODEL,
        "prompt": generator.choice(PROMPTS),
        "max_tokens": generator.randint(*MAX_TOKENS),
        "temperature": 0.8,
        # Sums round differently in a batch: among thousands of tokens that are next to impossible a draw would now and
        # then hit another one; among a few likely ones it does not.
        "min_p": 0.05,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def events(port: int, body: dict[str, Any]) -> AsyncIterator[str]:
    """Yield the data of each event of a stream. Raises RefusedError, and ValueError for any other answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        content = json.dumps(body).encode()
        fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        writer.write(f"POST /v1/completions HTTP/1.0\r\n{fields}\r\n\r\n".encode() + content)
        status = (await reader.readline()).split()
        if status[1:2] in ([b"429"], [b"503"]):
            raise RefusedError
        if status[1:2] != [b"200"]:
            raise ValueError(f"status {status[1:2]}: {(await reader.read())[-300:]!r}")
        while (await reader.readline()).strip():
            pass  # headers
        while line := await reader.readline():
            if line.startswith(b"data: "):
                yield line[6:].decode().strip()
    finally:
        writer.close()


async def follow(port: int, body: dict[str, Any]) -> Stream:
    """Read one stream to its end and check it."""
    stream = Stream(body, time.perf_counter())
    done, finish, counted = False, None, None
    try:
        async for data in events(port, body):
            if done:
                raise ValueError("something came after [DONE]")
            if data == "[DONE]":
                done = True
                continue
            event = json.loads(data)
            if "error" in event:
                raise ValueError(event["error"]["message"])
            counted = (event["usage"] or {}).get("completion_tokens", counted)
            for choice in event["choices"]:
                if finish:
                    raise ValueError("something came after the end")
                finish = choice["finish_reason"]
                stream.text += choice["text"]
                if not finish:
                    stream.times.append(time.perf_counter())
        if not (done and finish and counted == len(stream.times)):
            raise ValueError(f"{len(stream.times)} tokens of {counted}, finish {finish}, [DONE] {done}")
    except RefusedError:
        stream.refused = True
    except (OSError, ValueError, KeyError, TypeError) as error:
        stream.fault = f"{type(error).__name__}: {error}"
    return stream


async def load(port: int, clients: int, seconds: float, numbers: Iterator[int]) -> list[Stream]:
    """Let this many clients ask, each again as soon as it has its answer, or a second after it was refused."""
    end, streams = time.perf_counter() + seconds, []

    async def client() -> None:
        while time.perf_counter() < end:
            streams.append(await follow(port, request(next(numbers))))
            if streams[-1].refused:
                await asyncio.sleep(1)

    await asyncio.gather(*(client() for _ in range(clients)))
    return streams


def watch_health(port: int, seconds: float) -> list[float]:
    """Ask for /health again and again, each time on a new connection; return how long each answer took, in seconds.

    It is called in a process of its own: the clients would hold it up. No answer counts as WATCH_PATIENCE.
    """
    took, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WATCH_PATIENCE)
        try:
            connection.request("GET", "/health", headers={"Host": "localhost", "Connection": "close"})
            well = connection.getresponse().status == 200
        except OSError:
            well = False
        finally:
            connection.close()
        took.append(time.perf_counter() - begin if well else WATCH_PATIENCE)
        time.sleep(WATCH_EVERY)
    return took


def rate(streams: list[Stream], begin: float, end: float) -> float:
    """Return the tokens per second that came between the two times."""
    return sum(begin <= each < end for stream in streams for each in stream.times) / (end - begin)


@contextlib.contextmanager
def serving(run: Path, options: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Run `gpt serve`, for its port and process number. Raises InputError where it does not begin or end well."""
    command = [sys.executable, "-m", "cli", "serve", str(run), "--port", "0", "--name", MODEL, *options]
    environment = {name: value for name, value in os.environ.items() if name != "GPT_API_KEY"}
    with (
        ending_together(),
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        url = next((line.strip() for line in process.stdout if line.startswith("http://")), None)
        try:
            if url is not None:
                yield urlsplit(url).port or 0, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait()
            log.seek(0)
        if url is None or code != 0:
            raise InputError(f"gpt serve ended with {code}: {log.read()[-500:].strip()}")


def told(port: int) -> dict[str, tuple[float, float]]:
    """Return the sum and the count of each of the server's own histograms."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found = {sample.name: sample.value for family in families for sample in family.samples}
    return {name: (found[f"gpt_{name}_sum"], found[f"gpt_{name}_count"]) for name in HISTOGRAMS}


async def measure(port: int, process: int, clients: int, seconds: float) -> dict[str, Any]:
    numbers = itertools.count()
    await load(port, 1, 1.0, numbers)
    begin = time.perf_counter()
    alone = rate(await load(port, 1, seconds / 6, numbers), begin, begin + seconds / 6)

    memory, before = [resident(process)], told(port)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        await asyncio.wrap_future(pool.submit(int))  # the process has begun
        begin = time.perf_counter()
        watching = asyncio.wrap_future(pool.submit(watch_health, port, seconds))
        running = asyncio.create_task(load(port, clients, seconds, numbers))
        while not running.done():
            await asyncio.sleep(seconds / 30)
            memory.append(resident(process))
        asked, health = await running, await watching
    streams = [stream for stream in asked if not stream.refused]
    together = rate(streams, begin + seconds / 6, begin + seconds)

    after = told(port)
    means = {name: (after[name][0] - total) / (after[name][1] - count) for name, (total, count) in before.items()}
    samples = [stream for stream in streams[::SAMPLE_EVERY] if not stream.fault][:SAMPLES]
    again = [await follow(port, stream.body) for stream in samples]
    gaps = [later - earlier for stream in streams for earlier, later in pairwise(stream.times)]
    first = [stream.times[0] - stream.begin for stream in streams if stream.times]
    return {
        "clients": clients,
        "seconds": seconds,
        "streams": len(streams),
        "refused": len(asked) - len(streams),
        "tokens": sum(len(stream.times) for stream in streams),
        "faults": [stream.fault for stream in streams if stream.fault],
        "asked_again_alone": len(samples),
        "different_alone": sum(one.text != other.text for one, other in zip(samples, again, strict=True)),
        "tokens_per_second": together,
        "tokens_per_second_of_one_client": alone,
        "against_one_client": together / alone,
        "first_token_seconds": quantiles(first),
        "token_gap_seconds": quantiles(gaps),
        "mean_seconds_told_by_the_server": means,
        "health_seconds": {**quantiles(health), "worst": max(health), "asked": len(health)},
        "memory_bytes": {
            "one_client": memory[0],
            "settled": memory[len(memory) // 6],
            "end": memory[-1],
            "peak": max(memory),
        },
    }


def resident(process: int) -> int:
    """Return the bytes of memory that a process holds."""
    return 1024 * int(Path(f"/proc/{process}/status").read_text().partition("VmRSS:")[2].split()[0])


def quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{share}": cuts[share - 1] for share in (50, 95, 99)}


def bench_serving(run: Path, *, clients: int, seconds: float, options: Sequence[str] = ()) -> dict[str, Any]:
    """Load with one client, then many, then ask a sample of their requests again, alone: each must get the same text.

    Rates are tokens per second; the first sixth of the time does not count. `options` are those of `gpt serve`.
    Raises InputError where the server fails.
    """
    with serving(run, options) as (port, process):
        return asyncio.run(measure(port, process, clients, seconds))
