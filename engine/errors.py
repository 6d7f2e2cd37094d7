"""The one error that a person, not a programmer, is meant to read."""

from collections.abc import Iterable

# The seconds that a process waits to say what it knows from another one, which may say it itself and end them all.
GRACE = 1.0


class InputError(Exception):
    """Something the user gave cannot be used. The message says what, where, and what to do; the CLI exits with 2."""

    exit_code = 2


def meant(name: str, known: Iterable[str]) -> str:
    """Return what a message about an unknown name ends with: the known one that is like it, or nothing."""
    import difflib

    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


class UnfinishedError(InputError):
    """Something was lacking on the way, such as room or a network: what is done is of use, the same command goes on."""


class DiskError(UnfinishedError):
    """A disk refuses what is to be written. The message names the file, and what is free there."""
