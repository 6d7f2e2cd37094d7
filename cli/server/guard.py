"""What holds for every answer: strict headers, the Host check, one log line without a word of the conversation."""

import logging
import time
import traceback
from collections.abc import Collection
from urllib.parse import quote, urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cli.server.metrics import Metrics

LOG = logging.getLogger("gpt.serve")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
RAW_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]


def log_failure(error: BaseException) -> None:
    """Where it happened, and its type: a message may quote what a person wrote."""
    LOG.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)).rstrip())


class Guard:
    """`hosts`: the names that the Host header may say; None is any.

    A page of another site that has its own name resolve to 127.0.0.1 (DNS rebinding) still sends that name.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, hosts: Collection[str] | None) -> None:
        self.app, self.metrics, self.hosts = app, metrics, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *RAW_HEADERS]
            await send(message)

        try:
            app = self.app if self._welcome(scope) else Response("unknown host", 400)
            await app(scope, receive, guarded)
        except Exception as error:
            log_failure(error)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests[route, status] += 1
            milliseconds = 1000 * (time.perf_counter() - begin)
            LOG.info("%s %s %d %.0f ms", scope["method"], quote(scope["path"]), status, milliseconds)

    def _welcome(self, scope: Scope) -> bool:
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        try:
            return self.hosts is None or urlsplit(f"//{host}").hostname in self.hosts
        except ValueError:
            return False
