"""How far long work has come: who does the work tells it, and who shows it listens. Unless asked to, nobody does."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar

# Told how much is done by now, as often as it may be: a listener decides what it shows.
Told = Callable[[float], object]
# Called with a phrase, the whole amount (None where nobody knows it) and its unit. The work is over with the block.
Listener = Callable[[str, float | None, str], AbstractContextManager[Told]]


@contextlib.contextmanager
def _nobody(what: str, total: float | None, unit: str) -> Iterator[Told]:
    yield lambda done: None


# A parameter for it would pass through every function on the way, most of which only hand it on.
listener: ContextVar[Listener] = ContextVar("listener", default=_nobody)


@contextlib.contextmanager
def shown(to: Listener) -> Iterator[None]:
    """Within the block this listener hears of all work."""
    token = listener.set(to)
    try:
        yield
    finally:
        listener.reset(token)
