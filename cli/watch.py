"""gpt watch: all runs under a folder in the browser, while they train."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from cli.options import LOOPBACK, ApiKey, Host, Insecure, Port
from cli.serve import run_server
from engine.errors import InputError


def watch(
    folder: Annotated[Path, Argument(help="The folder that runs are kept in, or a run.")] = Path("runs"),
    host: Host = LOOPBACK,
    port: Port = 8001,
    api_key: ApiKey = None,
    insecure: Insecure = False,
) -> None:
    """Show all runs under a folder in the browser, live while they train: curves, samples, and what is alive.

    Example: gpt watch

    It reads the files of the runs, and writes none.
    """
    from cli.server.guard import require_key

    hosts = require_key(host, api_key, insecure=insecure)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: name one that holds runs, or train one with `gpt train nano`")

    import uvicorn

    from cli.watching.app import create_app

    app = create_app(folder, key=api_key, hosts=hosts)
    quiet = uvicorn.Config(app, access_log=False, log_config=None, server_header=False, limit_concurrency=256)
    run_server(uvicorn.Server(quiet), host, port, f"the runs in {folder}")
