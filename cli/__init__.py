"""The `gpt` command: parse, call, print."""

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "gpt-from-text"


def installed(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
