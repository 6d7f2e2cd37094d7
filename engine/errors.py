"""The one error that a person, not a programmer, is meant to read."""


class InputError(Exception):
    """Something the user gave cannot be used. The message says what, where, and what to do; the CLI exits with 2."""
