"""Files are written whole or not at all, and what a disk refuses is one sentence with its path."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary

import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from engine import disk
from engine.errors import DiskError

Refuse = Callable[..., None]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Have every file be refused when it is to be synced, by this error."""

    def patch(code: int = errno.ENOSPC) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    return patch


@pytest.mark.parametrize("moment", ["write_bytes", "sync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "new" / "config.json"
    disk.write_atomically(path, b"old")
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr({"write_bytes": Path, "sync": disk, "replace": os}[moment], moment, crash)
        disk.write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old" and [*path.parent.iterdir()] == [path]
    disk.write_atomically(path, "new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_what_a_disk_refuses_is_said_with_the_path_and_the_old_file_stays(
    code: int, tmp_path: Path, refuse: Refuse
) -> None:
    path = tmp_path / "report.md"
    path.write_text("old")
    refuse(code)
    with pytest.raises(DiskError) as error:
        disk.write_atomically(path, "new")
    assert str(error.value).startswith(f"cannot write {path}: {os.strerror(code)}")
    assert ("free on its disk" in str(error.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_the_errors_of_safetensors_and_of_many_writers_are_a_disks_too(tmp_path: Path) -> None:
    several = CheckpointException("write", {1: (OSError(errno.ENOSPC, "No space left on device"), StackSummary())})
    expected = r"model: No space left on device; 5.0 MB are wanted and .* are free"
    for error in (SafetensorError("Error while serializing: I/O error: No space (os error 28)"), several):
        with pytest.raises(DiskError, match=expected), disk.writing(tmp_path / "model", 5_000_000):
            raise error


def test_what_is_read_while_a_file_is_written_has_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source"), disk.writing(tmp_path / "out" / "tokens"):
        open(tmp_path / "source")  # noqa: SIM115


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    disk.append(path, '{"step": 1}\n')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The first bytes of the next line still fit.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
        with pytest.raises(DiskError, match=r"metrics.jsonl: File too large"):
            disk.append(path, '{"step": 2}\n')
        with pytest.raises(DiskError):
            disk.append(tmp_path / "new", "more than twenty bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == '{"step": 1}\n' and not (tmp_path / "new").exists()
    disk.append(path, '{"step": 2}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_device_is_written_to_and_a_link_is_followed(tmp_path: Path) -> None:
    disk.write_atomically(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(DiskError, match="/dev/full: No space left"):
        disk.append(Path("/dev/full"), "gone")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    disk.write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "new" and (tmp_path / "link").is_symlink()


def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    disk.require_writable(tmp_path / "new" / "folder" / "file")
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="Not a directory"):
        disk.require_writable(tmp_path / "file" / "below")
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_sizes_are_written_for_a_person() -> None:
    assert [disk.in_words(size) for size in (812, 5_230_000, 41_900_000_000)] == ["812 bytes", "5.2 MB", "41.9 GB"]
