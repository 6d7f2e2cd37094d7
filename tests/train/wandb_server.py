"""A stand-in for wandb's server on this machine: answers what wandb-core 0.31 asks, and keeps what it is sent."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "project", "name": "gpt", "entity": {"id": "entity", "name": "somebody"}}


class Server(ThreadingHTTPServer):
    """`history` holds the lines of each run's curve, and `config` what was said of it, by the run's id."""

    def __init__(self) -> None:
        self.history: dict[str, list[str]] = {}
        self.config: dict[str, str] = {}
        self.summary: dict[str, str] = {}
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is none."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def rows(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.history[run]]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables.get("name", "")
        if "RunResumeStatus" in query:
            lines = self.history.get(run)
            bucket = {
                "id": run,
                "name": run,
                "summaryMetrics": self.summary.get(run, "{}"),
                "displayName": "run",
                "logLineCount": 0,
                "historyLineCount": len(lines or []),
                "eventsLineCount": 0,
                "historyTail": json.dumps((lines or [])[-1:]),
                "eventsTail": "[]",
                "config": self.config.get(run, "{}"),
                "tags": [],
                "notes": None,
                "wandbConfig": '{"t": 1}',  # without a "t" a run counts as not begun
            }
            return {"model": {**PROJECT, "bucket": None if lines is None else bucket}}
        if "UpsertBucket" in query:
            self.config[run] = variables["config"] or self.config.get(run, "{}")
            new = run not in self.history
            count = len(self.history.setdefault(run, []))
            bucket = {"id": run, "name": run, "displayName": "run", "description": None, "config": self.config[run]}
            bucket |= {"sweepName": None, "project": PROJECT, "historyLineCount": count}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self._read())
        if self.path == "/graphql":
            self._send({"data": self.server.answer(body["query"], body.get("variables") or {})})
            return
        run, files = self.path.split("/")[-2], body.get("files") or {}
        if sent := files.get("wandb-history.jsonl"):
            self.server.history[run][sent["offset"] : sent["offset"] + len(sent["content"])] = sent["content"]
        if sent := files.get("wandb-summary.json"):
            self.server.summary[run] = sent["content"][-1]
        self._send({"limits": {}})

    def do_PUT(self) -> None:
        self._read()
        self._send({})

    def do_GET(self) -> None:
        self._send({})

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, value: dict[str, Any]) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
