"""Many clients at once, slow, silent, half-way and leaving ones among them: nobody who stays loses a token."""

import asyncio
import contextlib
import json
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.faults import child
from tests.faults.board import Board, Case

# How many clients, for how many seconds, and how many files the server may have open at most.
LOADS = [(256, 15.0, None), (600, 12.0, 512)]
KINDS = ["reader"] * 8 + ["slow", "slow", "whole", "leaving", "silent", "half a header", "half a body"]
LOG_BYTES = 2**20


async def exchange(port: int, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    await writer.drain()
    return reader, writer


def asking(path: str, **fields: object) -> bytes:
    body = json.dumps({"model": "chat", **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Load:
    """The clients of one server, and what they saw."""

    def __init__(self, port: int, seconds: float, full: bool) -> None:
        self.port, self.full, self.end = port, full, time.monotonic() + seconds
        self.seen: Counter[str] = Counter()
        self.health: list[float] = []
        self.faults: list[str] = []

    async def client(self, kind: str, draw: random.Random) -> None:
        while time.monotonic() < self.end:
            try:
                async with asyncio.timeout(60):
                    await self.once(kind, draw)
            except TimeoutError:
                self.faults.append(f"FAIL hang: a {kind} client waited for a minute")
            except OSError as error:
                self.seen[f"{kind}: {type(error).__name__}"] += 1
                if not self.full:
                    self.faults.append(f"FAIL lost: a {kind} client met {error!r}")
                await asyncio.sleep(0.2)
            await asyncio.sleep(draw.random() * 0.1)

    async def once(self, kind: str, draw: random.Random) -> None:
        prompt = {
            "prompt": f"The {draw.randrange(1000)}",
            "max_tokens": draw.randint(1, 40),
            "seed": draw.randrange(99),
        }
        sent = asking("/v1/completions", **prompt, stream=kind != "whole", **self.options(kind))
        if kind in ("silent", "half a header", "half a body"):
            cut = {"silent": 0, "half a header": 40, "half a body": len(sent) - 20}[kind]
            _, writer = await exchange(self.port, sent[:cut])
            await asyncio.sleep(min(5.0, max(0.0, self.end - time.monotonic())))
            writer.close()
            self.seen[kind] += 1
            return
        reader, writer = await exchange(self.port, sent)
        try:
            status = int((await reader.readline()).split()[1] or 0)
            self.seen[f"status {status}"] += 1
            if status >= 500 and not (self.full and status == 503):
                self.faults.append(f"FAIL 5xx: {status} for a {kind} client")
            if kind == "leaving":
                await reader.read(100)
                return
            content = bytearray()
            while part := await reader.read(65536 if kind != "slow" else 256):
                content += part
                if kind == "slow":
                    await asyncio.sleep(0.05)
            if status == 200 and kind != "whole":
                self.check(kind, content.decode())
        finally:
            writer.close()
        if status in (429, 503):
            await asyncio.sleep(0.3)

    def options(self, kind: str) -> dict[str, object]:
        return {} if kind == "whole" else {"stream_options": {"include_usage": True}}

    def check(self, kind: str, content: str) -> None:
        events = [line[6:] for line in content.splitlines() if line.startswith("data: ")]
        if not events or events[-1] != "[DONE]":
            self.faults.append(f"FAIL lost: the stream of a {kind} client ended without [DONE]: {content[-100:]!r}")
            return
        chunks = [json.loads(event) for event in events[:-1]]
        self.seen["tokens"] += chunks[-1]["usage"]["completion_tokens"]
        if not any(choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]):
            self.faults.append(f"FAIL lost: a stream without an end: {content[-200:]!r}")

    async def watch(self) -> None:
        """Ask how it is, as what restarts a server does."""
        while time.monotonic() < self.end:
            begin = time.monotonic()
            with contextlib.suppress(OSError, IndexError):
                reader, writer = await exchange(self.port, b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
                status = int((await reader.read()).split()[1])
                writer.close()
                if status == 200:
                    self.health.append(time.monotonic() - begin)
                elif not (self.full and status == 503):
                    self.faults.append(f"FAIL 5xx: health says {status}")
            await asyncio.sleep(0.05)

    async def all(self, clients: int, seed: str) -> None:
        kinds = [KINDS[number % len(KINDS)] for number in range(clients)]
        await asyncio.gather(
            self.watch(), *(self.client(kind, random.Random(f"{seed} {n}")) for n, kind in enumerate(kinds))
        )


def load(port: int, clients: int, seconds: float, full: bool, seed: str) -> Callable[[], None]:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        found = Load(port, seconds, full)
        asyncio.run(found.all(clients, seed))
        for fault in found.faults[:20]:
            print(fault)
        waits = sorted(found.health) or [0.0]
        figures = {"health_p99": waits[int(0.99 * (len(waits) - 1))], "health_worst": waits[-1]}
        print(json.dumps({**figures, **found.seen}))

    return work


def limited(files: int | None) -> Callable[[], None]:
    def work() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        child.gpt("serve", "chat", "--port", "0", "--device", "cpu", "--precision", "fp32")()

    return work


def memory(process: int) -> float:
    """What a process holds, in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def busy(process: int) -> float:
    """The seconds of CPU that it has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def run(board: Board) -> None:
    for case in board.cases(len(LOADS)):
        clients, seconds, files = LOADS[case.number]
        case.what = f"{clients} clients for {seconds:.0f} s{f', {files} files at most' if files else ''}"
        board.tried += clients - 1
        with child.copied(board.world, case.folder / "w") as here:
            serve(case, here, clients, seconds, files)


def serve(case: Case, here: Path, clients: int, seconds: float, files: int | None) -> None:
    server = child.Child(limited(files), here)
    if not server.until("http://", 60):
        case.judge(server.wait(1))
        return
    port = int(server.read().rpartition("http://127.0.0.1:")[2].split()[0])
    before = memory(server.pid)
    other = here.parent / "clients"
    other.mkdir()
    seed = f"{case.board.seed} {case.number}"
    done = child.run(load(port, clients, seconds, files is not None, seed), other, seconds + 120)
    case.judge(done)
    case.told(done)
    figures = json.loads(done.out.splitlines()[-1]) if done.code == 0 else {}
    figures |= {"MiB_before": before, "MiB_after": memory(server.pid)}
    case.board.figures |= {f"{clients} clients, {name}": round(each, 4) for name, each in figures.items()}
    time.sleep(2)
    begun = busy(server.pid)
    time.sleep(2)
    if busy(server.pid) - begun > 1:
        case.fail("hang", "two seconds after all have left, it is still busy")
    if len(server.read()) > LOG_BYTES:
        case.fail("left behind", f"a log of {len(server.read()):,} bytes")
    server.send(signal.SIGTERM)
    server.begun = time.monotonic()
    ended = server.wait(30)
    case.judge(ended)
    if ended.stopped:
        case.fail("hang", "30 s after SIGTERM it is still there")
