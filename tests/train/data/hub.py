"""A small Hugging Face hub on loopback: it answers what huggingface_hub 2.4 and datasets 5.2 ask, or has trouble."""

import hashlib
import io
import json
import math
import re
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# A trouble is the pattern of the requests that it meets, what they are answered, and how many of them it still meets.
BREAK = "break"  # half of the file is sent, then the connection ends


class Hub(ThreadingHTTPServer):
    """Data sets and models, each with its commits, newest last, and the requests that were made, as "METHOD /path"."""

    daemon_threads = True

    def __init__(self) -> None:
        self.sets: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: dict[str, int] = {}  # data sets that only a token opens, and the status without one
        self.requests: list[str] = []
        self.ranges: list[str] = []  # of files, as they were asked for
        self.troubles: list[list[Any]] = []
        self.gone = 0.0  # the requests that are still to be hung up on
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, name: str, files: Mapping[str, bytes]) -> str:
        """Make these files the newest commit of a data set, and return it."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.sets.setdefault(name, {})[commit] = dict(files)
        return commit

    def rows(self, name: str, config: str = "", **splits: list[Any]) -> str:
        """Publish these rows, a file of JSON lines for each split; with a config, beside another one."""
        files = {f"{split}.jsonl": lines(rows) for split, rows in splits.items()}
        card = ["---", "configs:", f"- config_name: {config or 'default'}", "  data_files:"]
        card += [f"  - {{split: {split}, path: {split}.jsonl}}" for split in splits]
        card += ["- {config_name: another, data_files: none/*}"] if config else []
        return self.publish(name, files | {"README.md": "\n".join([*card, "---\n"]).encode()})

    def trouble(self, pattern: str, answer: int | str, times: float = 1, **headers: str) -> None:
        self.troubles.append([pattern, answer, times, headers])

    def count(self, pattern: str = "") -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let every connection end without an answer, those that are open too."""
        self.gone = math.inf
        try:
            yield
        finally:
            self.gone = 0

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is none."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {unquote(self.path)}"
        self.server.requests.append(asked)
        if self.server.gone > 0:
            self.server.gone -= 1
            self.hang_up()
            return
        for trouble in self.server.troubles:
            pattern, answer, times, headers = trouble
            if times > 0 and re.search(pattern, asked):
                trouble[2] -= 1
                if answer is None:
                    break
                self.answer(asked, body, broken=True) if answer == BREAK else self.send(answer, b"", headers)
                return
        self.answer(asked, body)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def answer(self, asked: str, body: bytes, broken: bool = False) -> None:
        url = urlsplit(asked.partition(" ")[2])
        found = re.fullmatch(
            r"/(?:api/)?(?:(?:datasets|models)/)?([^/]+/[^/]+)(?:/(resolve|tree|paths-info|revision)/([^/]+)/?(.*))?",
            url.path,
        )
        if not found:
            self.send(200 if url.path == "/" else 404)
            return
        name, what, revision, path = found.groups()
        commits = self.server.sets.get(name)
        if commits is None:
            self.send(
                401, b"", {"X-Error-Code": "RepoNotFound"}
            )  # the hub does not tell what is not there from what is private
            return
        if name in self.server.gated and "Authorization" not in self.headers and what == "resolve":
            self.send(self.server.gated[name], b"", {"X-Error-Code": "GatedRepo"})
            return
        commit = list(commits)[-1] if revision in (None, "main") else revision
        if commit not in commits:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        files, options = commits[commit], parse_qs(url.query)
        if what == "resolve":
            self.send_file(path, files.get(path), commit, broken)
        elif what in ("tree", "paths-info"):
            folder = f"{path}/" if path else ""
            folders = {part for each in files for part in accumulate(each.split("/")[:-1], "{}/{}".format)}
            entries = [{"type": "file", "path": each, **about(each, files[each])} for each in files]
            entries += [{"type": "directory", "path": each, "oid": etag(each.encode())} for each in sorted(folders)]
            if what == "tree":
                deep = options["recursive"] == ["true"]
                inside = [each for each in entries if each["path"].startswith(folder)]
                entries = [each for each in inside if deep or "/" not in each["path"].removeprefix(folder)]
            else:
                asked_for = parse_qs(body.decode()).get("paths", [])
                entries = [each for each in entries if each["path"] in asked_for]
            if folder and not entries:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            self.send(200, json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": each, **about(each, files[each])} for each in files]
            gated = "auto" if name in self.server.gated else False
            info = {"id": name, "sha": commit, "private": False, "gated": gated, "siblings": siblings, "tags": []}
            self.send(200, json.dumps(info).encode())

    def send_file(self, path: str, content: bytes | None, commit: str, broken: bool) -> None:
        if content is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        headers = {"ETag": f'"{etag(content, path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, whole = 200, len(content)
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or whole), whole - 1)
            if first >= whole:
                self.send(416)
                return
            status, content = 206, content[first : last + 1]
            self.server.ranges.append(part[0])
            headers["Content-Range"] = f"bytes {first}-{last}/{whole}"
        self.send(status, content, headers, broken)

    def send(
        self, status: int, content: bytes = b"", headers: Mapping[str, str] | None = None, broken: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if broken else content)
        if broken:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


def lines(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_file(rows: list[Any], group: int = 10) -> bytes:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), file := io.BytesIO(), row_group_size=group)
    return file.getvalue()


def about(path: str, content: bytes) -> dict[str, Any]:
    """What the Hub says of a file; what Git LFS keeps is known by its SHA-256."""
    digest = etag(content, path)
    large = {"lfs": {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 100}}
    return {"size": len(content), "oid": digest[:40]} | (large if is_large(path) else {})


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def etag(content: bytes, path: str = "") -> str:
    return (hashlib.sha256 if is_large(path) else hashlib.sha1)(content).hexdigest()
