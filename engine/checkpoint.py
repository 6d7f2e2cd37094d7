"""Checkpoints that exist whole or not at all.

A checkpoint is a folder `step-00001000` of safetensors and JSON files with a `manifest.json` that holds the size and
SHA-256 of each. It is written beside its final name, synced to disk and then renamed, so that a crash at any moment
leaves either the old state or the new one. Loading verifies it. Nothing is ever unpickled.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.errors import InputError

MANIFEST = "manifest.json"
EVALUATION = "evaluation.json"
FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpointError(Exception):
    """A checkpoint's files are not those that its manifest lists."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int

    def verify(self) -> None:
        """Compare every file with the manifest. Raises DamagedCheckpointError naming the file that differs."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            version, step = manifest["format"], manifest["step"]
            files = {name: (each["bytes"], each["sha256"]) for name, each in manifest["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise DamagedCheckpointError(f"{self.path}: {MANIFEST} is missing or unreadable") from None
        if version != FORMAT:
            raise InputError(f"{self.path} has format {version}; this version reads {FORMAT}")
        if step != self.step:
            raise DamagedCheckpointError(f"{self.path}: {MANIFEST} is that of step {step}")
        for name, (size, checksum) in files.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != size or _sha256(file) != checksum:
                raise DamagedCheckpointError(f"{file} is missing, cut short or changed")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `name`.safetensors, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")

    def values(self, name: str) -> dict[str, Any]:
        """The contents of `name`.json."""
        return json.loads((self.path / f"{name}.json").read_text())

    def evaluation(self) -> dict[str, Any] | None:
        """What was measured on this checkpoint, if anything was."""
        try:
            measured = json.loads((self.path / EVALUATION).read_text())
        except (OSError, ValueError):
            return None
        return measured if isinstance(measured, dict) else None

    def record_evaluation(self, values: Mapping[str, Any]) -> None:
        """Put an evaluation beside the checkpoint. It comes later, so the manifest does not list it."""
        write_atomically(self.path / EVALUATION, json.dumps(dict(values), indent=2).encode())


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Mapping[str, Any]]
) -> Checkpoint:
    """Write checkpoint `step` into folder: each entry of tensors as NAME.safetensors, each of values as NAME.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(".writing-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    final = folder / f"step-{step:08d}"
    writing = folder / f".writing-{final.name}"
    writing.mkdir()
    for name, group in tensors.items():
        # Shared or strided storage would be written twice or refused.
        save_file({key: tensor.detach().contiguous() for key, tensor in group.items()}, writing / f"{name}.safetensors")
    for name, content in values.items():
        (writing / f"{name}.json").write_text(json.dumps(dict(content), indent=2))
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(writing.iterdir())}
    (writing / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2))
    for file in writing.iterdir():
        sync(file)
    sync(writing)
    if final.exists():
        # The same step again, after resuming from before it: the old one was damaged.
        _remove(final)
    os.rename(writing, final)
    sync(folder)
    return Checkpoint(final, step)


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints in a folder, oldest first. Found by looking: there is no pointer that could be wrong."""
    if not folder.is_dir():
        return []
    found = [Checkpoint(path, int(match.group(1))) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest(folder: Path, notice: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """The newest checkpoint that verifies. Each damaged one passed over is named to `notice`."""
    for checkpoint in reversed(checkpoints(folder)):
        try:
            checkpoint.verify()
        except DamagedCheckpointError as damage:
            notice(f"{damage}; using the checkpoint before it")
            continue
        return checkpoint
    return None


def best(folder: Path) -> Checkpoint | None:
    """The checkpoint with the lowest evaluated loss that is finite, or None where there is none."""
    scored = [
        (evaluation["loss"], -checkpoint.step, checkpoint)
        for checkpoint in checkpoints(folder)
        if (evaluation := checkpoint.evaluation()) and math.isfinite(evaluation.get("loss", math.nan))
    ]
    return min(scored)[2] if scored else None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    kept = best(folder)
    for checkpoint in checkpoints(folder)[:-keep]:
        if checkpoint != kept:
            _remove(checkpoint.path)


def _remove(path: Path) -> None:
    """Delete a checkpoint. It loses its name first: a crash in the middle must not leave a half one."""
    removed = path.with_name(f".writing-removed-{path.name}")
    os.rename(path, removed)
    shutil.rmtree(removed, ignore_errors=True)


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which did not verify: steps that come again must not meet their names."""
    for checkpoint in checkpoints(folder):
        if checkpoint.step > step:
            aside = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint.path, aside)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content such that a reader, or a crash, sees the old or the new, never a half."""
    writing = path.with_name(f".writing-{path.name}")
    writing.write_bytes(content)
    sync(writing)
    os.replace(writing, path)


def sync(path: Path) -> None:
    """Have the operating system put a file's content, or a folder's list of names, on disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
