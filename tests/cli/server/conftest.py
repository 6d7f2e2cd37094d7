"""Real servers, each on a port and in a thread of its own, with an untrained model behind them."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx
import openai

from cli.server.app import Served, create_app
from cli.server.connections import HTTPServer
from cli.server.worker import Worker
from engine.batcher import Batcher, Chosen, Step
from engine.config import ModelConfig
from engine.model import GPT
from engine.runtime import ToHost
from engine.tokenizer import Tokenizer

CONTEXT = 96
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass
class Live:
    url: str
    worker: Worker
    served: Served
    server: HTTPServer
    http: httpx.Client

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(f"/v1/{path}", json=body, **options)

    def paced(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.01) -> None:
        """Slow the model down, to a token of each text at a time, so that things happen while it is at work."""
        step = self.worker.batcher.step
        monkeypatch.setattr("engine.batcher.MOST_TURNS", 1, raising=False)

        def slowly() -> Any:
            time.sleep(seconds)
            return step()

        monkeypatch.setattr(self.worker.batcher, "step", slowly)

    def connect(self, data: bytes = b"") -> socket.socket:
        """A client that has sent this much."""
        address = httpx.URL(self.url)
        client = socket.create_connection((address.host, address.port), timeout=10)
        client.sendall(data)
        return client

    def idle(self) -> bool:
        return not self.worker.jobs and self.worker.batcher.idle

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, "it never came to pass"
            time.sleep(0.005)


@contextlib.contextmanager
def live(
    tokenizer: Tokenizer,
    *,
    chat: bool = True,
    slots: int = 4,
    queue: int = 8,
    seconds: float = 60.0,
    connections: int = 100,
    **options: Any,
) -> Iterator[Live]:
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, width=32, blocks=2, heads=2, context=CONTEXT))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
        # It never ends a text by itself.
        for piece in tokenizer.special.values():
            model.head_weight[piece] = 0
    worker = Worker(Batcher(model, slots=slots, queue=slots + queue), queue=queue, seconds=seconds)
    served = Served("small", chat, tokenizer, CONTEXT, 1_700_000_000)
    app = create_app(served, worker, **{"key": None, "cors": (), "hosts": LOOPBACK, **options})
    server = HTTPServer(app, worker, connections)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # So that little is on its way to who does not read.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            with httpx.Client(base_url=url, timeout=20) as client:
                assert client.get("/health").status_code == 200
                yield Live(url, worker, served, server, client)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="package")
def server(tokenizer: Tokenizer) -> Iterator[Live]:
    """A chat model, no key."""
    with live(tokenizer) as running:
        yield running


@pytest.fixture
def ending(server: Live, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """ending(2): the model writes two tokens, and then the piece that ends a text."""

    def write(tokens: int, end: str = "<|endoftext|>") -> list[int]:
        tokenizer = server.served.tokenizer
        ids = [*tokenizer.encode("the fox was brave")[:tokens], tokenizer.special[end]]

        batcher = server.worker.batcher

        def arrived(chosen: Chosen) -> list[Step]:
            # Native steps choose where no test can look, but what they chose arrives here.
            found = torch.tensor([ids[min(len(each.tokens), tokens)] for each in chosen.rows])
            likeliest, logprobs = ToHost(found[:, None]), ToHost(torch.full((len(found), 2), -0.25))
            return type(batcher)._arrived(batcher, Chosen(chosen.rows, ToHost(found), logprobs, likeliest))

        monkeypatch.setattr(batcher, "_arrived", arrived)
        return ids

    return write
