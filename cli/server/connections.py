"""The connections of the server: how many there may be, how long they may idle, and how they end."""

import asyncio
import functools
import resource
import time
from socket import socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cli.server.answers import to_json
from cli.server.app import READER_SECONDS
from cli.server.openai import APIError
from cli.server.worker import LOG, Worker

# The most connections, where the limit on open files allows so many.
CONNECTIONS = 4096
# Files for everything else: the page, and connections that are being refused.
SPARE_FILES = 128
# asyncio accepts this many connections before it looks at any, and each has its file before it can be refused.
ACCEPTED_AT_ONCE = 16
# The seconds that a connection may be open without a request under way, which begins when all its headers are there.
IDLE_SECONDS = 30
# The seconds that one who is refused has to read why.
REFUSED_SECONDS = 2
# The seconds that running answers may take when the server is told to end; containers are killed after 30 seconds.
GRACE_SECONDS = 25
# The seconds that clients then have to read the end of what was cut short.
LAST_SECONDS = 1
FULL = to_json(APIError(503, "The server has too many connections; try again later.", kind="server_error").content)
REFUSAL = f"""HTTP/1.1 503 Service Unavailable\r
Connection: close\r
Content-Type: application/json\r
Content-Length: {len(FULL)}\r
Retry-After: 1\r
\r
{FULL}"""


def room_for_connections() -> int:
    """Raise the limit on open files as far as is wanted and allowed; return how many connections have room.

    When files run out, asyncio tries to accept the next connection again and again, and does little else.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (2**31 if each == resource.RLIM_INFINITY else each for each in limits)
    wanted = min(CONNECTIONS + SPARE_FILES, hard)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
    return max(1, min(CONNECTIONS, max(soft, wanted) - SPARE_FILES))


class Connection(H11Protocol):
    """A connection of `owner`, refused where there are too many. `idle` counts the seconds without a request."""

    cycle: Any

    def __init__(self, *args: Any, owner: "HTTPServer", **options: Any) -> None:
        super().__init__(*args, **options)
        self.owner, self.idle, self.refused, self.latest = owner, 0, False, None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        beyond = len(self.connections) - self.owner.most
        self.refused = beyond > 0
        if self.owner.should_exit or beyond > SPARE_FILES // 2:
            transport.abort()
        elif self.refused:
            self.owner.log_full()
            # What it sends is read and dropped meanwhile: closed with something unread, it would see a reset.
            transport.write(REFUSAL.encode())
            transport.write_eof()
            self.loop.call_later(REFUSED_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        if not self.refused:
            super().data_received(data)

    @property
    def busy(self) -> bool:
        """Whether a request is under way, and whoever answers it minds the time."""
        return bool(self.cycle and not self.cycle.response_complete and not self.transport.is_closing())

    def look(self) -> None:
        """Called every second: end a connection that has had nothing to do for too long, or that does not close."""
        self.idle = 0 if self.busy or self.cycle is not self.latest else self.idle + 1
        self.latest = self.cycle
        if self.idle > (READER_SECONDS if self.transport.get_write_buffer_size() else IDLE_SECONDS):
            self.transport.abort()

    def shutdown(self) -> None:
        """End, at once where no whole request is there, and else with its answer."""
        if self.busy and self.cycle.more_body:
            self.transport.abort()
        elif self.busy:
            self.cycle.keep_alive = False
        else:
            self.transport.close()


class HTTPServer(uvicorn.Server):
    """uvicorn with at most `most` connections, each of them bounded in time, and an end in order."""

    def __init__(self, app: Any, worker: Worker, most: int) -> None:
        self.worker, self.most, self.logged = worker, most, 0.0
        connection: Any = functools.partial(Connection, owner=self)
        quiet: dict[str, Any] = {"access_log": False, "log_config": None, "server_header": False}
        super().__init__(uvicorn.Config(app, http=connection, loop="asyncio", backlog=ACCEPTED_AT_ONCE, **quiet))

    def log_full(self) -> None:
        if time.monotonic() > self.logged + 60:
            self.logged = time.monotonic()
            LOG.warning("all %d connections are taken: the next are refused with 503", self.most)

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(2048)  # how many may wait is another number than how many are accepted at once

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            for connection in list(self.server_state.connections):
                connection.look()  # type: ignore[union-attr]
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self.hurry)
        await super().shutdown(sockets)
        timer.cancel()

    def hurry(self) -> None:
        """End all answers with what they have, and shortly after that the connections of those who do not read."""
        self.worker.expire()
        asyncio.get_running_loop().call_later(LAST_SECONDS, self.abort)

    def abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal to end: a second one ends sooner."""
        if self.should_exit:
            asyncio.get_running_loop().call_soon_threadsafe(self.hurry)
        self.should_exit = True
