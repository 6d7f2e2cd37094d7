"""A checkpoint exists whole or not at all, and a damaged one is named and passed over."""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from engine import checkpoint, disk, records
from engine.checkpoint import Checkpoint, DamagedCheckpointError
from engine.errors import InputError


def content(step: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, Any]]]:
    strided = torch.arange(12.0).view(3, 4).t() + step
    tensors = {"model": {"a": torch.full((3,), float(step)), "b": strided}, "random": {"cpu": torch.get_rng_state()}}
    return tensors, {"state": {"step": step, "note": "\u00fc"}}


def save(folder: Path, *steps: int) -> list[Checkpoint]:
    return [checkpoint.save(folder, step, *content(step)) for step in steps]


def check(found: Checkpoint | None, step: int) -> None:
    assert found is not None and found.step == step
    found.verify()
    tensors, values = content(step)
    assert found.values("state") == values["state"]
    for name, group in tensors.items():
        loaded = found.tensors(name)
        assert loaded.keys() == group.keys()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in group.items())


def test_what_was_saved_comes_back_and_the_newest_is_the_latest(tmp_path: Path) -> None:
    assert checkpoint.checkpoints(tmp_path / "none") == [] and checkpoint.latest(tmp_path / "none") is None
    folder = tmp_path / "deep" / "checkpoints"
    assert save(folder, 90, 100, 123_456_789)[1].path.name == "step-00000100"
    (folder / "step-1").mkdir()
    (folder / "notes.txt").write_text("not a checkpoint")
    assert [each.step for each in checkpoint.checkpoints(folder)] == [90, 100, 123_456_789]
    check(checkpoint.latest(folder), 123_456_789)
    # Whoever may read the manifest may read the weights.
    assert len({file.stat().st_mode for file in (folder / "step-00000100").iterdir()}) == 1


class Crash(BaseException):
    """The power goes."""


def crash_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the `moment`-th write, sync or rename raise, and every one after it: nothing gets to tidy up."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= moment:
                raise Crash
            return function(*args, **options)

        return wrapper

    for owner, name in (
        (disk, "sync"),
        (os, "rename"),
        (os, "replace"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (shutil, "rmtree"),
        (safetensors.torch, "save_file"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "in place of a damaged one"])
def test_a_crash_at_any_moment_of_saving_leaves_the_old_checkpoint_or_the_new(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        save(folder, 1, 2) if again else save(folder, 1)
        if again:
            damage_model(folder / "step-00000002")
        try:
            with monkeypatch.context() as patch:
                crash_at(moment, patch)
                save(folder, 2)
            crashed = False
        except Crash:
            crashed = True
        latest = checkpoint.latest(folder)
        assert latest is not None
        check(latest, latest.step)
        outcomes.append(latest.step)
        # Whatever was left lying about does not stand in the way.
        check(save(folder, 3)[0], 3)
        assert not list(folder.glob(".writing-*"))
        if not crashed:
            break
    assert len(outcomes) > 10 and outcomes[0] == 1 and outcomes[-1] == 2
    assert outcomes == sorted(outcomes)


def test_every_file_is_on_disk_before_the_rename_and_the_rename_before_it_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = disk.sync, os.rename

    def noted_sync(path: Path) -> None:
        sync(path)
        events.append(f"sync {path.name}")

    def noted_rename(old: Path, new: Path) -> None:
        rename(old, new)
        events.append(f"rename {new.name}")

    monkeypatch.setattr(disk, "sync", noted_sync)
    monkeypatch.setattr(os, "rename", noted_rename)
    (saved,) = save(tmp_path, 1)
    files = {f"sync {file.name}" for file in saved.path.iterdir()}
    assert set(events[:-3]) == files
    assert events[-3:] == [f"sync .writing-{saved.path.name}", f"rename {saved.path.name}", f"sync {tmp_path.name}"]


def damage_model(path: Path) -> None:
    flip(path / "model.safetensors", -5)


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "random.safetensors", "state.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, file.stat().st_size - 1),
        lambda file: os.truncate(file, 0),
        lambda file: flip(file, -3),
        lambda file: flip(file, 2),
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    ],
    ids=["cut by one", "emptied", "late bit", "early bit", "deleted", "longer"],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_used(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    *_, last = save(tmp_path, 1, 2, 3)
    damage(last.path / name)
    with pytest.raises(DamagedCheckpointError, match=name):
        last.verify()
    notices: list[str] = []
    check(checkpoint.latest(tmp_path, notices.append), 2)
    assert len(notices) == 1 and str(last.path / name) in notices[0]


@pytest.mark.parametrize(
    "broken",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        '{"files": {}}',
        '{"format": 1, "step": 2, "files": []}',
        '{"format": 1, "step": 2, "files": {"model.safetensors": 3}}',
        '{"format": 1, "step": 1, "files": {}}',
    ],
)
def test_a_broken_manifest_is_named_and_the_checkpoint_before_it_is_used(broken: str | None, tmp_path: Path) -> None:
    _, last = save(tmp_path, 1, 2)
    manifest = last.path / "manifest.json"
    if broken is None:
        manifest.unlink()
    else:
        manifest.write_text(broken)
    notices: list[str] = []
    check(checkpoint.latest(tmp_path, notices.append), 1)
    assert len(notices) == 1 and "manifest.json" in notices[0] and str(last.path) in notices[0]


def test_no_flipped_bit_in_a_manifest_goes_unnoticed(tmp_path: Path) -> None:
    (saved,) = save(tmp_path, 1)
    manifest = saved.path / "manifest.json"
    original = manifest.read_bytes()
    for place in range(len(original)):
        flip(manifest, place)
        try:
            same = json.loads(manifest.read_bytes()) == json.loads(original)
        except ValueError:
            same = False
        if not same:
            with pytest.raises((DamagedCheckpointError, InputError), match="step-00000001"):
                saved.verify()
        manifest.write_bytes(original)
    saved.verify()


def test_a_checkpoint_of_another_format_says_so(tmp_path: Path) -> None:
    (saved,) = save(tmp_path, 1)
    manifest = saved.path / "manifest.json"
    reseal(manifest, format=3)
    with pytest.raises(InputError, match="format 3; this version reads 1 and 2"):
        checkpoint.latest(tmp_path)


def reseal(manifest: Path, **changes: Any) -> None:
    """Change a manifest on purpose."""
    content = json.loads(manifest.read_text())
    del content["sha256"]
    manifest.write_text(records.dumps(content | changes))


def test_a_manifest_of_an_older_version_is_read_and_a_new_one_loses_no_field(tmp_path: Path) -> None:
    identity = {"model.heads": 2, "tokenizer": "0" * 64}
    saved = checkpoint.save(tmp_path, 1, *content(1), identity=identity)
    manifest = saved.path / "manifest.json"
    assert saved.manifest().identity == identity
    new = json.loads(manifest.read_text())
    for name in [name for name in new if name != "format"]:
        manifest.write_text(json.dumps({field: value for field, value in new.items() if field != name}))
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is damaged: its sha256 is"):
            saved.verify()
    manifest.write_text(json.dumps(new))
    # Without its files a manifest would find nothing wrong.
    reseal(manifest, files={})
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json lists no model\.safetensors"):
        saved.verify()
    manifest.write_text(json.dumps({"format": 1} | {name: new[name] for name in ("step", "files")}))
    check(checkpoint.latest(tmp_path), 1)
    assert saved.manifest().identity == {}


def test_a_damaged_evaluation_is_named_and_its_checkpoint_is_neither_the_best_nor_pruned(tmp_path: Path) -> None:
    evaluated(tmp_path, [1.0, 2.0, 3.0])
    file = tmp_path / "step-00000001" / "evaluation.json"
    for broken, said in {
        '{"loss": "low"}': 'loss should be a valid number, not "low"',
        '{"loss": [1]}': "loss should be a valid number",
        file.read_text().replace("1.0", "0.5"): "its sha256 is not that of its content",
        '{"loss": ' + "[" * 5000 + "]" * 5000 + "}": "nested more than",
    }.items():
        file.write_text(broken)
        notices: list[str] = []
        best = checkpoint.best(tmp_path, notices.append)
        assert best and best.step == 2
        assert len(notices) == 1 and f"{file} is damaged: " in notices[0] and said in notices[0]
    checkpoint.prune(tmp_path, 1)
    assert [each.step for each in checkpoint.checkpoints(tmp_path)] == [1, 2, 3]


def test_an_evaluation_is_kept_beside_the_checkpoint_and_is_no_damage(tmp_path: Path) -> None:
    (saved,) = save(tmp_path, 1)
    assert saved.evaluation() is None
    saved.record_evaluation({"loss": 1.5, "bits_per_byte": 0.7})
    saved.record_evaluation({"loss": 1.25})
    assert saved.evaluation() == {"loss": 1.25}
    check(saved, 1)
    for broken in ("{", "[1]", "3"):
        (saved.path / "evaluation.json").write_text(broken)
        assert saved.evaluation() is None
    check(saved, 1)


def evaluated(folder: Path, losses: list[float | None]) -> None:
    for step, loss in enumerate(losses, start=1):
        (saved,) = save(folder, step)
        if loss is not None:
            saved.record_evaluation({"loss": loss})


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([None, None], None),
        ([2.0, 1.0, 3.0, None], 2),
        ([1.0, 1.0], 2),
        ([math.nan, 2.0, 3.0], 2),
        ([math.inf, math.nan], None),
    ],
    ids=str,
)
def test_the_best_checkpoint_has_the_lowest_loss_measured(
    losses: list[float | None], expected: int | None, tmp_path: Path
) -> None:
    evaluated(tmp_path, losses)
    best = checkpoint.best(tmp_path)
    assert (best and best.step) == expected


@pytest.mark.parametrize(
    ("losses", "keep", "left"),
    [
        ([None] * 5, 2, [4, 5]),
        ([3.0, 1.0, 2.0, 2.0, 2.0], 2, [2, 4, 5]),
        ([3.0, 2.0, 1.0, 0.5], 1, [4]),
        ([None, 1.0], 5, [1, 2]),
    ],
)
def test_pruning_keeps_the_newest_and_the_best(
    losses: list[float | None], keep: int, left: list[int], tmp_path: Path
) -> None:
    evaluated(tmp_path, losses)
    checkpoint.prune(tmp_path, keep)
    assert [each.step for each in checkpoint.checkpoints(tmp_path)] == left
    for each in checkpoint.checkpoints(tmp_path):
        check(each, each.step)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    with monkeypatch.context() as patch:
        for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            patch.setattr(owner, name, refuse)
        save(tmp_path, 1)
        check(checkpoint.latest(tmp_path), 1)
    assert {file.suffix for file in (tmp_path / "step-00000001").iterdir()} == {".safetensors", ".json"}
