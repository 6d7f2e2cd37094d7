"""What stands before every answer of our servers: whom they talk to, strict headers, and a log without any text."""

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import time
import traceback
from collections.abc import Callable, Collection
from urllib.parse import quote, urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import InputError

LOG = logging.getLogger("gpt.serve")
BODY_BYTES = 2**20
BODY_SECONDS = 30.0
# Of a body that nobody wants, this much is read and dropped after the answer, so that who is sending sees the answer.
DISCARD_BYTES = 32 * BODY_BYTES
HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}
CLOSE = (b"connection", b"close")


def require_key(host: str, key: str | None, *, insecure: bool) -> Collection[str] | None:
    """Return the names that Guard lets requests say, for a server that listens on `host`.

    Raises InputError where others than this machine's programs could come in, and need no key.
    """
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not (loopback or key or insecure):
        raise InputError(f"--host {host} lets others in: give them a key (--api-key or GPT_API_KEY), or say --insecure")
    return {"localhost", "127.0.0.1", "::1", host} if loopback else None


def carries(authorization: str, key: str) -> bool:
    """Return whether the header of this name carries the key."""
    scheme, _, given = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), key.encode())


def log_failure(error: BaseException) -> None:
    """Log the type of an error and where it happened, and no more: its message may quote what a person wrote."""
    LOG.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)).rstrip())


class Guard:
    """Every answer passes here: Host is checked, strict headers are added, and a line without any text is logged.

    An answer may come before its request is whole. Then the rest of the body is read and dropped, up to a bound, before
    the connection is closed: a client that sends all before it reads anything would see a reset, and no answer.

    `hosts` are the names that the Host header may say; None is any. A page of another site whose own name resolves to
    127.0.0.1 (DNS rebinding) still sends that name. `count` is told of each answer: route, status, seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str] | None,
        count: Callable[[str, int, float], object] = lambda *_: None,
    ) -> None:
        self.app, self.hosts, self.count = app, hosts, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0
        # Whether some of the body may not have been read.
        unread = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])

        async def received() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS.items(), *([CLOSE] if unread else [])]
            elif unread and not message.get("more_body"):
                await send({**message, "more_body": True})
                await discard()
                message = {"type": "http.response.body"}
            await send(message)

        async def discard() -> None:
            size, left = 0, begin + BODY_SECONDS - time.perf_counter()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(left, 1)):
                    while unread and size < DISCARD_BYTES:
                        size += len((await received()).get("body", b""))

        try:
            app = self.app if self._welcome(scope) else Response("unknown host", 400)
            await app(scope, received, guarded)
        except Exception as error:
            log_failure(error)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - begin
            self.count(route, status, seconds)
            LOG.info("%s %s %d %.0f ms", scope["method"], quote(scope["path"]), status, 1000 * seconds)

    def _welcome(self, scope: Scope) -> bool:
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        try:
            return self.hosts is None or urlsplit(f"//{host}").hostname in self.hosts
        except ValueError:
            return False
