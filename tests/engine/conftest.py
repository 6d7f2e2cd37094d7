"""Fixtures of other rooms that the engine's tests use, too."""

from tests.train.data.conftest import hub

__all__ = ["hub"]
