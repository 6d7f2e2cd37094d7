"""gpt serve: a model behind the OpenAI API, with a page to talk to it."""

import gc
import logging
import os
import re
import signal
import socket
import sys
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from typer import Option

from cli.options import LOOPBACK, ApiKey, Few, Host, Insecure, ModelOptions, Port, RunArgument
from engine.errors import InputError

if TYPE_CHECKING:
    import uvicorn

SLOTS = 32


def serve(
    path: RunArgument,
    options: ModelOptions,
    host: Host = LOOPBACK,
    port: Port = 8000,
    api_key: ApiKey = None,
    insecure: Insecure = False,
    cors: Annotated[
        list[str] | None, Option(help="A site whose pages may call: https://HOST[:PORT], or *. Repeatable.")
    ] = None,
    name: Annotated[str | None, Option(help="The model's name; else that of its folder.")] = None,
    slots: Annotated[Few | None, Option(help="Texts to generate at once; 32, or what memory has room for.")] = None,
    queue: Annotated[
        int, "at least 0 and at most 1000000", Option(help="Texts that may wait; more are refused.")
    ] = 128,
    max_seconds: Annotated[
        float, "at least 0.001 and at most 1000000", Option(help="The longest that a request may take.")
    ] = 300.0,
) -> None:
    """Serve a model: the OpenAI API under /v1, and a page to talk to it.

    Example: gpt serve runs/nano
    """
    sites = [origin(each) for each in cors or ()]
    if "*" in sites and not (api_key or insecure):
        raise InputError("--cors '*' lets every page call: ask for a key (--api-key or GPT_API_KEY), or say --insecure")
    from cli.server.guard import require_key

    hosts = require_key(host, api_key, insecure=insecure)

    # oneDNN keeps a compiled product for each shape that it has met, 1,024 of them: most prompts have a new one.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

    import torch

    from cli.server.app import Served, create_app
    from cli.server.connections import HTTPServer, room_for_connections
    from cli.server.worker import Worker
    from engine.batcher import Batcher
    from engine.run import Run

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("gpt.serve").setLevel(logging.INFO)
    run = Run(path)
    # The event loop gets a core of its own: else a matrix product waits for a thread that cannot run.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    model, tokenizer = options.load(run)
    name, created = name or path.resolve().name, int(run.config.stat().st_mtime)
    served = Served(name, run.read_recipe().chat, tokenizer, model.config.context, created)
    # The worker counts how many wait: the batcher's own queue never fills up.
    try:
        most = (slots or SLOTS) + queue
        batcher = Batcher(model, slots=slots, queue=most) if slots else Batcher.fitting(model, SLOTS, most)
    except InputError as error:
        raise InputError(f"--slots {slots or SLOTS}: {error}") from None
    worker = Worker(batcher, queue=queue, seconds=max_seconds)
    app = create_app(served, worker, key=api_key, cors=sites, hosts=hosts)
    kind = "a chat model" if served.chat else "a base model: it goes on from what it is given"
    # What is there by now stays to the end. Else each full garbage collection walks through all of torch's modules, and
    # every client waits for it: a fifth of a second with 64 of them.
    gc.freeze()
    server = HTTPServer(app, worker, room_for_connections())
    run_server(server, host, port, f"{served.name}, {kind}; {options.choose().describe()}")


def run_server(server: "uvicorn.Server", host: str, port: int, about: str) -> None:
    """Let a server answer until it is told to end; say what it is, and where."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise InputError(f"cannot listen at --host {host} --port {port} ({reason}); choose another one") from None
    with listening:
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn has handlers of its own only while it runs.
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        shown = f"[{host}]" if ":" in host else host
        print(about)
        print(f"http://{shown}:{listening.getsockname()[1]}", flush=True)
        server.run(sockets=[listening])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it has ended: another signal has nothing to add


def origin(site: str) -> str:
    """Return what browsers send as the origin of a site's pages. Raises InputError for what no browser sends."""
    try:
        parts = urlsplit(site)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    standard = {"http": 80, "https": 443}
    shown = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}" + (f":{port}" if port is not None else "")
    if site == "*" or (
        re.fullmatch("[a-z0-9.:_-]+", host) and parts.scheme in standard and site.lower().removesuffix("/") == shown
    ):
        return site if site == "*" else shown.removesuffix(f":{standard[parts.scheme]}")
    raise InputError(
        f"--cors is {site!r}; a site is http:// or https://, its name, and maybe a port: https://a.example"
    )
