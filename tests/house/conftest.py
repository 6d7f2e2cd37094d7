"""The command line, run in this process, for the commands of the README."""

from tests.cli.conftest import gpt, hub  # noqa: F401
