"""The routes of `gpt watch`: the page, and what it asks for again and again."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response
from starlette.types import ASGIApp

from cli import server
from cli.server.guard import Guard, carries
from cli.watching.files import Watched, as_text
from engine.errors import InputError

PAGE = Path(__file__).parent / "page"
SHARED = Path(server.__file__).parent / "page"


def create_app(folder: Path, *, key: str | None, hosts: Collection[str] | None) -> ASGIApp:
    """Return the application. Calls must carry `key`; Guard explains `hosts`."""
    watched = Watched(folder)

    def authorise(http: Request) -> None:
        if key and not carries(http.headers.get("authorization", ""), key):
            raise HTTPException(401, "Incorrect or no key provided.", {"WWW-Authenticate": "Bearer"})

    def answer(find: Callable[..., Any], *asked: Any) -> Response:
        try:
            return Response(json.dumps(find(*asked)), media_type="application/json")
        except KeyError:
            raise HTTPException(404, "There is no such run any more.") from None
        except (InputError, OSError) as error:
            # A folder that goes while it is read, say.
            raise HTTPException(503, as_text(error)) from None

    # What is read from disks is read in threads: these are no coroutines.
    def runs() -> Response:
        return answer(lambda: {"folder": str(folder), "runs": watched.listed()})

    def metrics(name: str, start: int = 0, tag: str = "", every: int = 1) -> Response:
        return answer(watched.metrics, name, start, tag, every)

    def samples(name: str) -> Response:
        return answer(watched.samples, name)

    def settings(name: str) -> Response:
        return answer(watched.settings, name)

    # FastAPI's own pages would load scripts from other sites.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    locked = APIRouter(dependencies=[Depends(authorise)])
    locked.add_api_route("/runs.json", runs, response_model=None)
    for route in (metrics, samples, settings):
        locked.add_api_route(f"/{route.__name__}/{{name}}", route, response_model=None)
    app.include_router(locked)
    # The page takes what it shares with that of `gpt serve` from there.
    app.mount("/shared", StaticFiles(directory=SHARED))
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return Guard(app, hosts)
