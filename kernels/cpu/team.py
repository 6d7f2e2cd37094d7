"""The threads that share a step. Each calls the same compiled function, with its number, and holds no GIL meanwhile."""

import os
import threading
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np

# Where in `sync` is what: each has a cache line of its own.
ARRIVALS, STARTS, ABANDONED, REST, STOPPED = 0, 8, 16, 24, 32


class Team:
    """So many threads, of which the caller is one. The others wait for work, in Python, until the process ends."""

    def __init__(self, members: int) -> None:
        self.members, self.busy = members, threading.Lock()
        self.sync = np.zeros(40, np.int64)
        self.queues: list[SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]]] = []
        for member in range(1, members):
            self.queues.append(SimpleQueue())
            threading.Thread(target=_work, args=(self.queues[-1], member), daemon=True).start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return function(*arguments, sync, start, member, members), called by each member, for the caller's member.

        `start` is which start of the team this is. If another thread has the team, the caller works alone.
        """
        if not self.queues or not self.busy.acquire(blocking=False):
            return function(*arguments, np.zeros_like(self.sync), 1, 0, 1)
        try:
            start = int(self.sync[STARTS]) + 1
            # Every member has arrived at the last meeting of the last run, or the caller would not have left it.
            self.sync[REST] = self.sync[ARRIVALS]
            work = (*arguments, self.sync, start), self.members
            for queue in self.queues:
                queue.put((function, work))
            return function(*work[0], 0, self.members)
        finally:
            # Ctrl-C may have come before the function began, for which the others wait.
            if self.sync[STARTS] < start:
                self.sync[ABANDONED] = start
                self.sync[STARTS] = start
            self.busy.release()


def _work(queue: Any, member: int) -> None:
    while True:
        function, (arguments, members) = queue.get()
        function(*arguments, member, members)
        del function, arguments


@cache
def _team(members: int, process: int) -> Team:
    return Team(members)


def team(members: int) -> Team:
    """Return the team of so many threads: one for all callers, and another one in a process that was forked."""
    return _team(members, os.getpid())
