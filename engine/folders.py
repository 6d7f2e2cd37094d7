"""The folder that a command writes: one writer at a time, nothing deleted but what is known, nothing left by a failure.

A lock is a POSIX record lock on a file in the folder. The kernel gives it up when its process ends, however it ends;
children do not inherit it, as they do flock's, so an orphan cannot hold it; and NFS knows it from machine to machine.
Readers ask for none.
"""

import contextlib
import errno
import fcntl
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.disk import require_writable
from engine.errors import InputError

LOCK, REPLACED = ".gpt-lock", ".gpt-replaced"
HELD = (errno.EACCES, errno.EAGAIN)
# File systems without locks answer with one of these.
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# After a machine is lost, NFS keeps its locks for up to a minute and a half.
PATIENCE_SECONDS = 120.0
# Longer than another process may be between two tries to make a folder.
RACE_SECONDS = 5.0


class Writer:
    """The one writer of a folder. `files` matches the path, seen from the folder, of every file that may be ours."""

    def __init__(self, folder: Path, files: re.Pattern[str], killed: str = "") -> None:
        self.folder, self.files = folder, files
        self.killed = killed  # what its lock file says of a writer that was killed
        self.replaced, self.replaces = folder / REPLACED, False
        if [path for path in folder.iterdir() if path.name != LOCK] == [self.replaced]:
            self._bring_back()  # who was to replace it was killed before anything new was there
        self.before = set(self.entries())

    def entries(self) -> list[Path]:
        """Return all that is in the folder but the lock, what is deeper first. Links are not followed."""
        inside = (Path(at, name) for at, folders, files in os.walk(self.folder, False) for name in (*files, *folders))
        return [path for path in inside if path != self.folder / LOCK]

    def knows(self, path: Path) -> bool:
        """Return whether a file has a name that we give, or is a folder. A link is a file, wherever it leads."""
        name = path.relative_to(self.folder).as_posix().removeprefix(f"{REPLACED}/")
        return _is_folder(path) or self.files.fullmatch(name) is not None

    def replace(self, what: str, say: Callable[[str], None]) -> None:
        """Set aside all that is in the folder, until it is deleted (`Run.begin`) or a failure brings it back.

        Raises InputError where something of it is not ours, or is being written.
        """
        entries = self.entries()
        if stranger := next((path for path in entries if not self.knows(path)), None):
            raise InputError(
                f"{stranger} is no part of {what}, so nothing in {self.folder} is deleted: move it away, or choose "
                "another folder with --out"
            )
        for path in entries:
            if path.name == LOCK:
                os.close(_lock(path.parent, 0.0, say)[0])
        files = [path.lstat().st_size for path in entries if not _is_folder(path)]
        say(f"deleting {what} in {self.folder}: {len(files):,} files, {sum(files) / 1e6:,.1f} MB")
        self.replaces = True
        if self.replaced.exists():
            # An earlier try was killed: what it has made goes, what it was to replace stays set aside.
            self._delete([path for path in entries if self.replaced not in (path, *path.parents)])
        else:
            self._move([path for path in entries if path.parent == self.folder], self.replaced)
        self.before = set()

    def clear(self) -> None:
        """Delete all that may be ours."""
        self._delete([path for path in self.entries() if self.knows(path)])
        self.before = set(self.entries())

    def undo(self) -> None:
        """Delete what was written since, and bring back what it was to replace."""
        written = [path for path in self.entries() if path not in self.before and self.knows(path)]
        self._delete([path for path in written if self.replaced not in (path, *path.parents)])
        if self.replaces and self.replaced.exists():
            self._bring_back()

    def _bring_back(self) -> None:
        self._move(list(self.replaced.iterdir()), self.folder)
        self.replaced.rmdir()

    def _move(self, paths: list[Path], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for path in paths:
            os.rename(path, folder / path.name)

    def _delete(self, paths: list[Path]) -> None:
        for path in paths:
            if not _is_folder(path):
                path.unlink(missing_ok=True)
            else:
                with contextlib.suppress(OSError):  # something that is not ours is in it
                    path.rmdir()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


@contextlib.contextmanager
def one_writer(
    folder: Path,
    files: re.Pattern[str],
    *,
    keep: Callable[[BaseException], bool] = lambda error: False,
    patience: float = 0.0,
    say: Callable[[str], None] = lambda message: None,
) -> Iterator[Writer]:
    """Be the one writer of a folder within the block; it is made where there is none.

    After an error, unless `keep` says otherwise, the folder is as it was before, or gone. Raises InputError where
    another process, which it names, writes the folder, and still does after `patience` seconds.
    """
    folder = folder.absolute()
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    lock, killed = _lock(folder, patience, say)
    try:
        writer = Writer(folder, files, killed)
        try:
            yield writer
        except BaseException as error:
            if not keep(error):
                writer.undo()
            raise
    finally:
        # The name goes before the lock does: who has opened the file meanwhile finds it without a name.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock), (folder / LOCK).stat()):
                (folder / LOCK).unlink()
        os.close(lock)
        with contextlib.suppress(OSError):
            for each in made:
                each.rmdir()


def require_free(path: Path, overwrite: bool, read: Callable[[Path], object]) -> None:
    """Refuse, before any work, to write a file where one is that `read` does not know, or none can be written.

    `read` raises InputError. Links are taken for what they lead to.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file with --out")
    if path.exists():
        if not overwrite:
            raise InputError(f"{path} is there already: --overwrite replaces it, --out writes elsewhere")
        try:
            read(path)
        except InputError as error:
            raise InputError(f"{path} is left alone, since this command did not write it: {error}") from None
    require_writable(path)


def _lock(folder: Path, patience: float, say: Callable[[str], None]) -> tuple[int, str]:
    """Return the descriptor of a folder's lock file, locked, and what it says of a writer that was killed.

    A process may not ask for the same one twice.
    """
    path, begin = folder / LOCK, time.monotonic()
    while True:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: choose a folder with --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A link could lead to a file of somebody's, which would be emptied.
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            # Its last writer has just taken the folder away.
            if time.monotonic() - begin > patience + RACE_SECONDS:
                raise
            continue
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNKNOWN:
                say(f"{folder} cannot be locked ({error.strerror}): see to it that nothing else writes there")
                return lock, ""
            holder = os.read(lock, 1000).decode(errors="replace") or "another process"
            os.close(lock)
            if error.errno not in HELD:
                raise
            if time.monotonic() - begin > patience:
                raise InputError(
                    f"{folder} is being written by {holder}; wait for its end, or choose another folder"
                ) from None
            time.sleep(0.5)
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                break
        # Its holder has just taken the file away, and another one may have made a new one.
        os.close(lock)
    # Who comes to an end takes the file away.
    killed = os.read(lock, 1000).decode(errors="replace")
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        command = shlex.join(["gpt", *sys.argv[1:]])
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()} ({command})"[:1000].encode(), 0)
    return lock, killed
