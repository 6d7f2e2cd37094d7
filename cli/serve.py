"""gpt serve"""

import sys
from typing import Annotated

import typer

from cli.options import CheckpointName, Device, GenerationPrecision, RunArgument
from engine.errors import InputError

# What is under way when the server is told to end may take so long; containers are killed after 30.
GRACE_SECONDS = 25


def serve(
    path: RunArgument,
    host: Annotated[str, typer.Option(help="The address to listen on. Others than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="GPT_API_KEY", show_default=False, help="What clients must send; better in GPT_API_KEY."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let everybody in, from everywhere, without a key.")] = (
        False
    ),
    cors: Annotated[
        list[str] | None, typer.Option(help="A site whose pages may call, such as https://example.com. Repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name; else that of its folder.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Texts to generate at once.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; more are refused.")] = 128,
    max_seconds: Annotated[
        float, typer.Option(min=0.001, help="Then a request ends with what it has, and 'length'.")
    ] = 300.0,
    device: Device = "auto",
    precision: GenerationPrecision = "auto",
    which: CheckpointName = "latest",
) -> None:
    """Serve a model: the OpenAI API under /v1, and a page to talk to it.

    Example: gpt serve runs/nano
    """
    loopback = _is_loopback(host)
    if not (loopback or api_key or insecure):
        raise InputError(
            f"--host {host} lets others in: give them a key (--api-key, or GPT_API_KEY), or say --insecure"
        )

    import logging
    import signal
    import socket

    import torch
    import uvicorn

    from cli.server.app import Served, create_app
    from cli.server.worker import Worker
    from engine import runtime
    from engine.batcher import Batcher
    from engine.run import Run

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("gpt.serve").setLevel(logging.INFO)
    run = Run(path)
    machine = runtime.choose(device, precision)
    # The event loop needs a core of its own: without it a product waits for a thread that is not running.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    model, tokenizer = run.load_model(machine, which, lambda message: print(message, file=sys.stderr))
    served = Served(
        name or path.resolve().name,
        run.read_recipe().chat,
        tokenizer,
        model.config.context,
        int(run.config.stat().st_mtime),
    )
    # The places of the batcher's own queue are counted by the worker.
    batcher = Batcher(model, slots=slots, queue=slots + queue)
    app = create_app(
        served,
        Worker(batcher, queue=queue, seconds=max_seconds),
        key=api_key,
        cors=cors or (),
        hosts={"localhost", "127.0.0.1", "::1", host} if loopback else None,
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn drains, and then raises the signal once more for whoever was listening before it.
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        kind = "a chat model" if served.chat else "a base model: it goes on from what it is given"
        shown = f"[{host}]" if ":" in host else host
        print(f"{served.name}, {kind}; {machine.describe()}")
        print(f"http://{shown}:{listening.getsockname()[1]}", flush=True)
        server.run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
