"""A server of the real page with a scripted model behind it, which a test holds still and lets go."""

import asyncio
import json
import math
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.base import RequestResponseEndpoint
from starlette.types import ASGIApp

PAGE = Path(__file__).parents[2] / "cli" / "server" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class PageServer:
    """What a test sets, and what it can look at afterwards."""

    def __init__(self) -> None:
        self.url = ""
        self.app = self._app()
        self.reset()

    def reset(self) -> None:
        self.info = {"model": "nano", "chat": True, "context": 256, "key_required": False}
        self.key = ""
        self.pieces = ["Once ", "there ", "was ", "a ", "fox."]
        self.delay = 0.0
        self.hold_after: int | None = None  # so many pieces come, then nothing until `go`
        self.cut = False  # the connection breaks in place of the end
        self.room = 10_000  # characters of prompt that fit
        self.shares = [0.95, 0.7, 0.4, 0.2, 0.05]  # of the pieces, where log-probabilities are asked for
        self.others = {"owl ": 0.04, "bytes:\\xc3": 0.03, "<|end|>": 0.02, "\n": 0.01}
        self.go = threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.left = threading.Event()  # the browser closed a stream

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def policy(request: Request, call_next: RequestResponseEndpoint) -> Response:
            response = await call_next(request)
            response.headers["Content-Security-Policy"] = POLICY
            return response

        @app.get("/page.json")
        async def info() -> dict[str, Any]:
            return self.info

        @app.post("/v1/chat/completions")
        @app.post("/v1/completions")
        async def answer(request: Request) -> Response:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return refusal(401, "invalid_api_key")
            body = await request.json()
            self.requests.append(body)
            prompt = body.get("prompt", "") + "".join(message["content"] for message in body.get("messages", ()))
            if len(prompt) > self.room:
                return refusal(400, "context_length_exceeded")
            asked = bool(body.get("logprobs"))
            stream = self._stream("prompt" in body, len(prompt) // 4, asked)
            return StreamingResponse(stream, media_type="text/event-stream")

        app.mount("/", StaticFiles(directory=PAGE, html=True))
        return app

    async def _stream(self, plain: bool, prompt_tokens: int, asked: bool) -> AsyncIterator[str]:
        finished = False
        try:
            for i, piece in enumerate(self.pieces):
                while i == self.hold_after and not self.go.is_set():
                    await asyncio.sleep(0.005)
                choice: dict[str, Any] = {"text": piece} if plain else {"delta": {"content": piece}}
                if asked:
                    choice["logprobs"] = self._thought(i, piece, plain)
                yield event({"choices": [{"index": 0, **choice, "finish_reason": None}]})
                await asyncio.sleep(self.delay)
            if self.cut:
                raise ConnectionResetError
            end: dict[str, Any] = {"text": ""} if plain else {"delta": {}}
            yield event({"choices": [{"index": 0, **end, "finish_reason": "stop"}]})
            count = len(self.pieces)
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}
            yield event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
            finished = True
        finally:
            if not finished:
                self.left.set()

    def _thought(self, i: int, piece: str, plain: bool) -> dict[str, Any]:
        """The likeliest tokens in place of a piece, in the shape of the endpoint."""
        likeliest = {piece: math.log(self.shares[i % 5]), **{name: math.log(p) for name, p in self.others.items()}}
        if plain:
            return {"tokens": [piece], "token_logprobs": [likeliest[piece]], "top_logprobs": [likeliest]}
        entries = []
        for name, logprob in likeliest.items():
            spelled = None if name == "<|end|>" else [0xC3] if name.startswith("bytes:") else list(name.encode())
            entries.append({"token": name.removeprefix("bytes:"), "logprob": logprob, "bytes": spelled})
        return {"content": [{**entries[0], "top_logprobs": entries}]}

    @contextmanager
    def running(self) -> Iterator["PageServer"]:
        with serving(self.app) as self.url:
            try:
                yield self
            finally:
                self.go.set()


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The URL where `app` answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def refusal(status: int, code: str) -> JSONResponse:
    error = {"message": f"refused: {code}", "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)
