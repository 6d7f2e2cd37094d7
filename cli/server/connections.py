"""The connections of the server: how many there may be, how long they may idle, and how they end.

A thread of its own accepts them, and answers /health itself: that does not wait for the answers of everybody else.
"""

import asyncio
import resource
import selectors
import socket
import threading
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cli.server.answers import to_json
from cli.server.app import READER_SECONDS
from cli.server.guard import CLOSE, HEADERS, LOG
from cli.server.openai import APIError
from cli.server.worker import Worker

# The most connections, where the limit on open files allows so many.
CONNECTIONS = 4096
# Files for everything else: the page, and connections that are new or refused.
SPARE_FILES = 256
# How many may wait to be accepted: who finds no place tries again after a second.
BACKLOG = 2048
# How many are accepted before anything else is looked at; each has its file before it can be refused.
ACCEPTED_AT_ONCE = 32
# How many new connections, and how many that are answered already, are waited for.
WAITING = 32
# The seconds that the thread waits for what a new connection has to say before the event loop gets it.
GREETING_SECONDS = 0.1
# The event loop is called dead when it has not moved for this many seconds.
STILL_SECONDS = 20
# The seconds that a connection may be open without a request under way, which begins when all its headers are there.
IDLE_SECONDS = 30
# The seconds that one who is refused has to read why.
REFUSED_SECONDS = 2
# The seconds that running answers may take when the server is told to end; containers are killed after 30 seconds.
GRACE_SECONDS = 25
# The seconds that clients then have to read the end of what was cut short.
LAST_SECONDS = 1


def _answer(status: str, content: Any) -> bytes:
    body = to_json(content).encode()
    fields = {**HEADERS, b"content-type": b"application/json", b"content-length": b"%d" % len(body)}
    lines = [f"HTTP/1.1 {status}".encode(), *(b": ".join(field) for field in (*fields.items(), CLOSE))]
    return b"\r\n".join([*lines, b"", body])


HEALTH = b"GET /health HTTP/1."
WELL = _answer("200 OK", {"status": "ok"})
ILL = _answer("503 Service Unavailable", {"status": "the model has failed"})
MESSAGE = "The server has too many connections; try again later."
FULL = _answer("503 Service Unavailable", APIError(503, MESSAGE, kind="server_error").content)


def room_for_connections() -> int:
    """Raise the limit on open files as far as is wanted and allowed; return how many connections have room.

    When files run out, asyncio tries to accept the next connection again and again, and does little else.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (2**31 if each == resource.RLIM_INFINITY else each for each in limits)
    wanted = min(CONNECTIONS + SPARE_FILES, hard)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
    files = max(soft, wanted)
    return min(CONNECTIONS, max(files - SPARE_FILES, files // 2))


class Connection(H11Protocol):
    """A connection that does not stay for nothing. `idle` counts the seconds without a request under way."""

    cycle: Any
    idle = 0
    latest: Any = None

    def __init__(self, server: "HTTPServer") -> None:
        super().__init__(server.config, server.server_state, server.lifespan.state, asyncio.get_running_loop())
        self.owner = server

    def connection_lost(self, exc: Exception | None) -> None:
        # First: once it is in no list of uvicorn's, the next may be there already.
        self.owner.gone += 1
        super().connection_lost(exc)

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


class Door(threading.Thread):
    """It accepts connections and hands them to the event loop, but /health and what is too much it answers itself."""

    def __init__(self, server: "HTTPServer", listening: socket.socket) -> None:
        super().__init__(name="door", daemon=True)
        self.server, self.listening, self.loop = server, listening, asyncio.get_running_loop()
        self.selector = selectors.DefaultSelector()
        # Until when each is waited for: new ones for what they say, answered ones for them to read the answer.
        self.new: dict[socket.socket, float] = {}
        self.answered: dict[socket.socket, float] = {}
        self.ready: list[socket.socket] = []
        self.open, self.handed, self.logged = True, 0, float("-inf")

    def close(self) -> None:
        self.open = False
        self.join()

    def run(self) -> None:
        self.listening.setblocking(False)
        self.listening.listen(BACKLOG)
        self.selector.register(self.listening, selectors.EVENT_READ)
        while self.open:
            for key, _ in self.selector.select(0.05):
                client: Any = key.fileobj
                if client is self.listening:
                    self._accept()
                elif client in self.answered:
                    self._drop(client)
                else:
                    self._look(client)
            self.ready += self._overdue(self.new)
            self._hand_over()
            for client in self._overdue(self.answered):
                self._end(client)
        for client in [*self.new, *self.answered]:
            self._end(client)
        self.selector.close()

    def _overdue(self, waiting: dict[socket.socket, float]) -> list[socket.socket]:
        """Return those whose time is up, and the oldest of too many."""
        now, beyond = time.monotonic(), len(waiting) - WAITING
        return [client for place, (client, until) in enumerate(waiting.items()) if until < now or place < beyond]

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                client, _ = self.listening.accept()
            except BlockingIOError:
                return
            except OSError:
                time.sleep(0.05)  # it is gone again, or files have run out after all
                return
            client.setblocking(False)
            self.selector.register(client, selectors.EVENT_READ)
            self.new[client] = time.monotonic() + GREETING_SECONDS
            self._look(client)

    def _look(self, client: socket.socket) -> None:
        """See what a new connection wants, without taking it from the socket."""
        try:
            said = client.recv(4096, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            self._end(client)
            return
        whole = b"\r\n\r\n" in said
        if said.startswith(HEALTH) and whole:
            ill = self.server.ill
            self._answer(client, ILL if ill else WELL)
            self.loop.call_soon_threadsafe(self.server.count_health, 503 if ill else 200)
        elif whole or not said or not HEALTH.startswith(said[: len(HEALTH)]):
            self.ready.append(client)
        else:
            time.sleep(0.001)  # the rest is on its way

    def _hand_over(self) -> None:
        """Hand all that are ready over at once: to wake the event loop for each would cost as much as to serve it."""
        server = self.server
        there = sum(door.handed for door in server.doors) - server.gone
        room, ready, self.ready = max(server.most - there, 0), list(dict.fromkeys(self.ready)), []
        taken, refused = ready[:room], ready[room:]
        for client in taken:
            self.selector.unregister(client)
            del self.new[client]
        if taken:
            self.handed += len(taken)
            self.loop.call_soon_threadsafe(server.take, taken)
        if refused and time.monotonic() > self.logged + 60:
            self.logged = time.monotonic()
            LOG.warning("all %d connections are taken: the next are refused with 503", server.most)
        for client in refused:
            self._answer(client, FULL)

    def _answer(self, client: socket.socket, answer: bytes) -> None:
        # What it sends is read and dropped meanwhile: closed with something unread, it would see a reset.
        self.answered[client] = time.monotonic() + REFUSED_SECONDS
        del self.new[client]
        try:
            client.send(answer)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(client)

    def _drop(self, client: socket.socket) -> None:
        try:
            if client.recv(2**16):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._end(client)

    def _end(self, client: socket.socket) -> None:
        self.selector.unregister(client)
        self.new.pop(client, None)
        self.answered.pop(client, None)
        client.close()


class HTTPServer(uvicorn.Server):
    """uvicorn with at most `most` connections, each of them bounded in time, and an end in order."""

    def __init__(self, app: Any, worker: Worker, most: int) -> None:
        quiet: dict[str, Any] = {"access_log": False, "log_config": None, "server_header": False}
        super().__init__(uvicorn.Config(app, http=Connection, loop="asyncio", **quiet))
        self.worker, self.most, self.moved = worker, most, time.monotonic()
        # How many connections have ended, of all that the doors have handed over.
        self.gone = 0
        self.coming: set[asyncio.Task[Any]] = set()
        self.doors: list[Door] = []

    @property
    def ill(self) -> bool:
        return self.worker.failed or time.monotonic() > self.moved + STILL_SECONDS

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self.doors = [Door(self, listening) for listening in sockets or ()]
        for door in self.doors:
            door.start()

    def take(self, clients: list[socket.socket]) -> None:
        """Serve connections that a door hands over."""
        loop = asyncio.get_running_loop()
        for client in clients:
            if self.should_exit:
                client.close()
                self.gone += 1
                continue
            task = loop.create_task(loop.connect_accepted_socket(lambda: Connection(self), client))
            self.coming.add(task)
            task.add_done_callback(self.coming.discard)

    def count_health(self, status: int) -> None:
        self.worker.requests["/health", status] += 1

    async def on_tick(self, counter: int) -> bool:
        self.moved = time.monotonic()
        if counter % 10 == 0:
            for connection in list(self.server_state.connections):
                connection.look()  # type: ignore[union-attr]
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for door in self.doors:
            door.close()
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
