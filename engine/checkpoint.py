"""Checkpoints that exist completely or not at all.

A checkpoint is a folder `step-00001000` of safetensors and JSON files with a `manifest.json` that holds the size and
SHA-256 of each, and what its run must still be for them to be the same model. It is written beside its final name,
synced to disk and then renamed, so that a crash at any moment leaves either the old state or the new one. Loading
verifies it. Nothing is ever unpickled.

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import disk, records
from engine.errors import DiskError, InputError
from engine.processes import ALONE, Processes

if TYPE_CHECKING:
    from torch import Tensor

# The contents of a checkpoint, by the names of its files without their endings.
Tensors = Mapping[str, Mapping[str, "Tensor"]]
Values = Mapping[str, Mapping[str, Any]]

MANIFEST = "manifest.json"
EVALUATION = "evaluation.json"
# The formats that can be read, and whether a manifest of each is sealed. The first one knew no identity.
FORMATS = {1: False, 2: True}
WEIGHTS = "model.safetensors"
NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpointError(Exception):
    """A checkpoint's files are not those that its manifest lists."""


@dataclass(frozen=True)
class File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of, and what it needs around it to be right, by names."""

    format: int
    step: int
    files: dict[str, File]
    identity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int

    def manifest(self) -> Manifest:
        """Return the manifest. Raises DamagedCheckpointError where it is none, InputError where it is a newer one."""
        try:
            return records.read(self.path / MANIFEST, Manifest, formats=FORMATS)
        except OSError as error:
            raise DamagedCheckpointError(f"{self.path / MANIFEST} cannot be read ({error.strerror})") from None
        except records.DamagedFileError as damage:
            raise DamagedCheckpointError(str(damage)) from None

    def verify(self, *, contents: bool = True) -> None:
        """Compare every file with the manifest, or its size alone, which takes no time.

        Raises DamagedCheckpointError naming the file that differs.
        """
        manifest = self.manifest()
        if manifest.step != self.step:
            raise DamagedCheckpointError(f"{self.path / MANIFEST} is that of step {manifest.step}")
        if WEIGHTS not in manifest.files:
            raise DamagedCheckpointError(f"{self.path / MANIFEST} lists no {WEIGHTS}")
        for name, listed in manifest.files.items():
            file = self.path / name
            whole = file.is_file() and file.stat().st_size == listed.bytes
            if not whole or (contents and _sha256(file) != listed.sha256):
                raise DamagedCheckpointError(f"{file} is missing, cut short or changed")

    def tensors(self, name: str) -> "dict[str, Tensor]":
        """Return the complete tensors called `name`, on the CPU, whether one file holds them or the shares of many."""
        from safetensors.torch import load_file

        file = self.path / f"{name}.safetensors"
        if file.is_file():
            return load_file(file)
        # Imported only where it is needed: that takes longer than to read the checkpoint of a small model.
        import torch
        from torch.distributed import checkpoint as distributed

        reader = distributed.HuggingFaceStorageReader(str(self.path))
        listed: Any = reader.read_metadata()
        keys = {at.fqn for at, share in listed.storage_data.items() if Path(share.relative_path).match(f"{name}-*")}
        kinds = {key: listed.state_dict_metadata[key] for key in keys}
        found = {key: torch.empty(kind.size, dtype=kind.properties.dtype) for key, kind in kinds.items()}
        distributed.load(found, storage_reader=reader, no_dist=True)
        return found

    def weights(self, name: str = "model") -> "dict[str, Tensor]":
        """Return the weights called `name` as those of a plain model: adapters are merged into them."""
        from engine.lora import merged

        return merged(self.tensors(name))

    def checksum(self, name: str) -> str | None:
        """Return the SHA-256 of `name`.safetensors by the manifest; None where it is not listed there."""
        try:
            listed = self.manifest().files.get(f"{name}.safetensors")
        except (DamagedCheckpointError, InputError):
            return None
        return listed.sha256 if listed else None

    def values(self, name: str, kind: Any = dict[str, Any]) -> Any:
        """Return the contents of `name`.json. Raises InputError where they are not of this kind."""
        return records.read(self.path / f"{name}.json", kind, "choose another checkpoint")

    def evaluation(self, notice: Callable[[str], None] = lambda message: None) -> dict[str, Any] | None:
        """Return what was measured on this checkpoint, if anything was. `notice` is told where that is damaged."""
        try:
            return records.read(self.path / EVALUATION, dict[str, float | None], "this checkpoint is not evaluated")
        except FileNotFoundError:
            return None
        except InputError as damage:
            notice(str(damage))
            return None

    def record_evaluation(self, values: Mapping[str, Any]) -> None:
        """Put an evaluation beside the checkpoint. It comes later, so the manifest does not list it."""
        disk.write_atomically(self.path / EVALUATION, records.dumps(values))


def at_step(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(folder / f"step-{step:08d}", step)


def save(
    folder: Path,
    step: int,
    tensors: Tensors,
    values: Values,
    optimizer: "Mapping[str, Tensor] | None" = None,
    processes: Processes = ALONE,
    identity: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write checkpoint `step` into folder: each entry of tensors as NAME.safetensors, each of values as NAME.json.

    The main process writes these. Each of several processes writes its share of the optimizer's state. `identity` is
    kept in the manifest: what a run must still be when the checkpoint is read. Raises DiskError where the disk refuses;
    nothing of it is left then.
    """
    final = at_step(folder, step).path
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
                _save_rest(writing, step, tensors, values, identity or {})
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


def _save_shares(writing: Path, optimizer: "Mapping[str, Tensor]", processes: Processes) -> None:
    from torch.distributed import checkpoint as distributed

    # The usual format of torch.distributed.checkpoint is read by unpickling; safetensors are not.
    writer = distributed.HuggingFaceStorageWriter(str(writing), save_distributed=True)
    distributed.save(dict(optimizer), storage_writer=writer, process_group=processes.group)
    if processes.main:
        files = sorted(writing.iterdir())
        for number, file in enumerate(files, 1):
            file.rename(writing / f"optimizer-{number:05d}-of-{len(files):05d}.safetensors")


def _save_rest(writing: Path, step: int, tensors: Tensors, values: Values, identity: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    for name, group in tensors.items():
        # Shared or strided storage would be written twice or refused.
        save_file({key: tensor.detach().contiguous() for key, tensor in group.items()}, writing / f"{name}.safetensors")
    for name, content in values.items():
        (writing / f"{name}.json").write_text(json.dumps(dict(content), indent=2))
    files = {file.name: File(file.stat().st_size, _sha256(file)) for file in sorted(writing.iterdir())}
    manifest = Manifest(max(FORMATS), step, files, dict(identity))
    (writing / MANIFEST).write_text(records.dumps(asdict(manifest)))
    for file in writing.iterdir():
        disk.share_as(file, writing / MANIFEST)
        disk.sync(file)
    disk.sync(writing)


class Saver:
    """Saves in a thread while training goes on, one checkpoint at a time, and prunes the folder to `keep` of them.

    A checkpoint that the disk refuses is left out, and said in `refusal`; the next one then must not be.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes, identity: Mapping[str, Any]) -> None:
        self.folder, self.keep, self.processes, self.identity = folder, keep, processes.apart(), identity
        self.pool = ThreadPoolExecutor(1)
        self.writing: Future[Checkpoint] | None = None
        self.saved: Checkpoint | None = None
        self.refusal: DiskError | None = None

    def start(self, step: int, tensors: Tensors, values: Values, optimizer: "Mapping[str, Tensor]") -> None:
        """Begin to `save` this. Nobody may change its tensors from now on.

        Where the last one was refused, make room and wait for this one. Raises DiskError if it is refused as well.
        """
        self.collect()

        def write() -> Checkpoint:
            saved = save(self.folder, step, tensors, values, optimizer, self.processes, self.identity)
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


def best(folder: Path, notice: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """Return the checkpoint with the lowest finite loss in its evaluation, or None where there is none."""
    losses = {each: (each.evaluation(notice) or {}).get("loss") for each in checkpoints(folder)}
    scored = [(loss, -each.step, each) for each, loss in losses.items() if loss is not None and math.isfinite(loss)]
    return min(scored)[2] if scored else None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one; one whose evaluation is damaged may be that."""
    kept = best(folder)
    for checkpoint in checkpoints(folder)[:-keep]:
        doubts: list[str] = []
        checkpoint.evaluation(doubts.append)
        if checkpoint != kept and not doubts:
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
