"""Files that are written whole or not at all, and one sentence where a disk refuses them."""

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engine.errors import DiskError


@contextlib.contextmanager
def writing(path: Path, wanted: int = 0) -> Iterator[None]:
    """Within the block `path` is written, a file or a folder, `wanted` bytes where that is known.

    Raises DiskError for what the disk refuses: it is full, read-only or broken, a quota or a limit is reached.
    """
    try:
        yield
    except BaseException as error:  # torch.distributed.checkpoint's is no Exception
        reason = _reason(error, path.parent)
        if reason is None:
            raise
        raise DiskError(f"cannot write {path}: {reason}{_numbers(path, reason, wanted)}") from None


def _reason(error: BaseException, folder: Path) -> str | None:
    """Return what a disk refused, in the words of the operating system; None where this is another error."""
    if isinstance(error, OSError):
        # What is read at the same time has its own errors, and a pipe's reader may leave.
        elsewhere = error.filename and folder.resolve() not in Path(error.filename).resolve().parents
        return None if elsewhere or isinstance(error, BrokenPipeError) else error.strerror or str(error)
    if failures := getattr(error, "failures", None):  # of torch.distributed.checkpoint, by process
        return next(filter(None, (_reason(failure, folder) for failure, _ in failures.values())), None)
    code = re.search(r"\(os error (\d+)\)", str(error))  # safetensors hands on what Rust says
    return os.strerror(int(code[1])) if code else None


def _numbers(path: Path, reason: str, wanted: int) -> str:
    if reason not in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)):
        return ""
    need = f"{in_words(wanted)} are wanted and " if wanted else ""
    return f"; {need}{in_words(free(path))} are free on its disk: make room there"


def free(path: Path) -> int:
    """Return the bytes that are free on the disk of a path, which need not exist yet."""
    disk = shutil.disk_usage(next(each for each in (path, *path.absolute().parents) if each.exists()))
    # A disk without a size, such as a tmpfs without a limit, says 0 for both.
    return disk.free if disk.total else sys.maxsize


def in_words(size: int) -> str:
    scale, unit = next(((scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB")) if size >= scale), (1, "bytes"))
    return f"{size / scale:,.{0 if scale == 1 else 1}f} {unit}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path to write a file at, which then takes the place of `path`: a reader finds the old one or the new.

    After an error nothing of it is left. What is no file, such as /dev/stdout, is written to as it is.
    """
    device = path.exists() and not path.is_file()
    path = path if device else path.resolve()
    new = path if device else path.with_name(f".writing-{path.name}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield new
            if not device:
                sync(new)
                os.replace(new, path)
        except BaseException:
            if not device:
                with contextlib.suppress(OSError):
                    new.unlink()
            raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file's content such that a reader finds the old content or the new one, even after a crash."""
    with replacing(path) as new:
        # A folder's name, of which a report tells, may hold bytes that are no text.
        new.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def append(path: Path, text: str) -> None:
    """Add all of the text to a file, or nothing of it."""
    with writing(path), open(path, "ab", buffering=0) as file:
        size, rest = file.tell(), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
                if size == 0 and path.is_file():
                    path.unlink()
            raise


def require_writable(path: Path) -> None:
    """Raise DiskError where a file could not be made, before much is computed that it is to hold."""
    there = next(each for each in path.absolute().parents if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}") from None


def share_as(path: Path, other: Path) -> None:
    """Let everybody read a file who may read the other. What safetensors writes, its owner alone may read."""
    if path.stat().st_mode != (mode := other.stat().st_mode):
        path.chmod(mode)


def sync(path: Path) -> None:
    """Make the operating system write a file's content, or a folder's list of names, to disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
