"""Checkpoints that exist completely or not at all.

A checkpoint is a folder `step-00001000` of safetensors and JSON files with a `manifest.json` that holds the size and
SHA-256 of each. It is written beside its final name, synced to disk and then renamed, so that a crash at any moment
leaves either the old state or the new one. Loading verifies it. Nothing is ever unpickled.

Several processes write the same format. A single one writes the optimizer's state to `optimizer.safetensors`; of
several, each writes its share to `optimizer-00001-of-00002.safetensors` and so on. They do it by
torch.distributed.checkpoint, and any number of processes can read it.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import disk
from engine.errors import DiskError, InputError
from engine.processes import ALONE, Processes

# The contents of a checkpoint, by the names of its files without their endings.
Tensors = Mapping[str, Mapping[str, Tensor]]
Values = Mapping[str, Mapping[str, Any]]

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
        """Return the complete tensors called `name`, on the CPU, whether one file holds them or the shares of many."""
        from safetensors.torch import load_file

        file = self.path / f"{name}.safetensors"
        if file.is_file():
            return load_file(file)
        # Imported only where it is needed: that takes longer than to read the checkpoint of a small model.
        from torch.distributed import checkpoint as distributed

        reader = distributed.HuggingFaceStorageReader(str(self.path))
        listed: Any = reader.read_metadata()
        keys = {at.fqn for at, share in listed.storage_data.items() if Path(share.relative_path).match(f"{name}-*")}
        kinds = {key: listed.state_dict_metadata[key] for key in keys}
        found = {key: torch.empty(kind.size, dtype=kind.properties.dtype) for key, kind in kinds.items()}
        distributed.load(found, storage_reader=reader, no_dist=True)
        return found

    def checksum(self, name: str) -> str | None:
        """Return the SHA-256 of `name`.safetensors by the manifest; None where it is not listed there."""
        try:
            files = json.loads((self.path / MANIFEST).read_text())["files"]
            return str(files[f"{name}.safetensors"]["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def values(self, name: str) -> dict[str, Any]:
        """Return the contents of `name`.json."""
        found: dict[str, Any] = json.loads((self.path / f"{name}.json").read_text())
        return found

    def evaluation(self) -> dict[str, Any] | None:
        """Return what was measured on this checkpoint, if anything was."""
        try:
            measured = json.loads((self.path / EVALUATION).read_text())
        except (OSError, ValueError):
            return None
        return measured if isinstance(measured, dict) else None

    def record_evaluation(self, values: Mapping[str, Any]) -> None:
        """Put an evaluation beside the checkpoint. It comes later, so the manifest does not list it."""
        disk.write_atomically(self.path / EVALUATION, json.dumps(dict(values), indent=2))


def save(
    folder: Path,
    step: int,
    tensors: Tensors,
    values: Values,
    optimizer: Mapping[str, Tensor] | None = None,
    processes: Processes = ALONE,
) -> Checkpoint:
    """Write checkpoint `step` into folder: each entry of tensors as NAME.safetensors, each of values as NAME.json.

    The main process writes these. Each of several processes writes its share of the optimizer's state. Raises DiskError
    where the disk refuses; nothing of it is left then.
    """
    final = folder / f"step-{step:08d}"
    writing = folder / f".writing-{final.name}"
    groups = [*tensors.values(), optimizer or {}]
    wanted = sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())

    def begin() -> None:
        if processes.main:
            with disk.writing(final, wanted):
                folder.mkdir(parents=True, exist_ok=True)
                remove_abandoned(folder)
                writing.mkdir()

    processes.together(begin)
    with disk.writing(final, wanted):
        try:
            if optimizer is not None and processes.count > 1:
                _save_shares(writing, optimizer, processes)
            elif optimizer is not None:
                tensors = {**tensors, "optimizer": optimizer}
            if processes.main:
                _save_rest(writing, step, tensors, values)
                if final.exists():
                    # The run resumed from an earlier step, because this checkpoint was damaged, and came here again.
                    _remove(final)
                os.rename(writing, final)
                disk.sync(folder)
        except BaseException:
            if processes.main:
                shutil.rmtree(writing, ignore_errors=True)
            raise
    return Checkpoint(final, step)


def _save_shares(writing: Path, optimizer: Mapping[str, Tensor], processes: Processes) -> None:
    from torch.distributed import checkpoint as distributed

    # The usual format of torch.distributed.checkpoint is read by unpickling; safetensors are not.
    writer = distributed.HuggingFaceStorageWriter(str(writing), save_distributed=True)
    distributed.save(dict(optimizer), storage_writer=writer, process_group=processes.group)
    if processes.main:
        files = sorted(writing.iterdir())
        for number, file in enumerate(files, 1):
            file.rename(writing / f"optimizer-{number:05d}-of-{len(files):05d}.safetensors")


def _save_rest(writing: Path, step: int, tensors: Tensors, values: Values) -> None:
    from safetensors.torch import save_file

    for name, group in tensors.items():
        # Shared or strided storage would be written twice or refused.
        save_file({key: tensor.detach().contiguous() for key, tensor in group.items()}, writing / f"{name}.safetensors")
    for name, content in values.items():
        (writing / f"{name}.json").write_text(json.dumps(dict(content), indent=2))
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(writing.iterdir())}
    (writing / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2))
    for file in writing.iterdir():
        disk.sync(file)
    disk.sync(writing)


class Saver:
    """Saves in a thread while training goes on, one checkpoint at a time, and prunes the folder to `keep` of them.

    A checkpoint that the disk refuses is left out, and said in `refusal`; the next one then must not be.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        self.folder, self.keep, self.processes = folder, keep, processes.apart()
        self.pool = ThreadPoolExecutor(1)
        self.writing: Future[Checkpoint] | None = None
        self.saved: Checkpoint | None = None
        self.refusal: DiskError | None = None

    def start(self, step: int, tensors: Tensors, values: Values, optimizer: Mapping[str, Tensor]) -> None:
        """Begin to `save` this. Nobody may change its tensors from now on.

        Where the last one was refused, make room and wait for this one. Raises DiskError if it is refused as well.
        """
        self.collect()

        def write() -> Checkpoint:
            saved = save(self.folder, step, tensors, values, optimizer, self.processes)
            if self.processes.main:
                prune(self.folder, self.keep)
            return saved

        refused = self.refusal is not None
        if refused:
            self.make_room()
        self.writing = self.pool.submit(write)
        if refused:
            self.collect()
            if self.refusal is not None:
                raise self.refusal

    def collect(self) -> Checkpoint | None:
        """Return the newest checkpoint, once it is on disk. All processes call it at once."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            try:
                self.saved, self.refusal = self.processes.together(writing.result), None
            except DiskError as refusal:
                self.refusal = refusal
        return self.saved

    def make_room(self) -> None:
        """Remove what a new checkpoint may replace, once the one that is being written is there."""
        wait([self.writing] if self.writing else [])
        if self.processes.main:
            make_room(self.folder, self.keep)

    def close(self) -> None:
        self.pool.shutdown()


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Return all checkpoints in a folder, oldest first. The names tell; there is no pointer that could be wrong."""
    if not folder.is_dir():
        return []
    found = [Checkpoint(path, int(match.group(1))) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest(folder: Path, notice: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """Return the newest checkpoint that verifies. `notice` is told of each damaged one that is passed over."""
    for checkpoint in reversed(checkpoints(folder)):
        try:
            checkpoint.verify()
            return checkpoint
        except DamagedCheckpointError as damage:
            notice(f"{damage}; using the checkpoint before it")
    return None


def best(folder: Path) -> Checkpoint | None:
    """Return the checkpoint with the lowest finite loss in its evaluation, or None where there is none."""
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
            with disk.writing(folder):
                _remove(checkpoint.path)


def make_room(folder: Path, keep: int) -> None:
    """Remove what a new checkpoint may replace: what a crash left half written, and all but `keep` with the new one."""
    with contextlib.suppress(DiskError):
        prune(folder, max(keep - 1, 1))
    remove_abandoned(folder)


def remove_abandoned(folder: Path) -> None:
    for abandoned in folder.glob(".writing-*"):
        shutil.rmtree(abandoned, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a crash in the middle cannot leave an incomplete one."""
    removed = path.with_name(f".writing-removed-{path.name}")
    os.rename(path, removed)
    shutil.rmtree(removed, ignore_errors=True)


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which did not verify, so that the same steps can be saved again."""
    for checkpoint in checkpoints(folder):
        if checkpoint.step > step:
            aside = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint.path, aside)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
