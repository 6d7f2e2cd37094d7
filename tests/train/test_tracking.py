"""metrics.jsonl and wandb."""

import importlib
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from engine.config import Recipe
from engine.errors import DiskError, InputError
from engine.laws import Forecast
from tests.train.conftest import Train
from tests.train.wandb_server import serve
from train import tracking
from train.tracking import BAND_LINES, Band, MetricsFile, RunningMetrics, Wandb, read_metrics, require_wandb


def test_a_run_that_leaves_its_band_is_warned_about_once() -> None:
    said: list[str] = []
    asked: list[tuple[float, float]] = []

    def expected(tokens: float, rate: float) -> Forecast | None:
        asked.append((tokens, rate))
        return None if tokens < 100 else Forecast(0.9, 1.0, 1.1)

    band = Band(expected, said.append)
    line = {"step": 7, "tokens": 200, "rate": 0.5, "progress": 0.009, "bits_per_byte": 9.0}
    for _ in range(2 * BAND_LINES):
        band.log(line)  # within the first percent
    for value in (0.5, 1.5) * (BAND_LINES // 2):
        band.log({**line, "progress": 0.02, "bits_per_byte": value})  # their mean is what was expected
    band.log({"step": 8, "tokens": 50, "validation_bits_per_byte": 9.0})  # too early for a forecast
    band.log({"step": 8, "tokens": 300, "validation_bits_per_byte": 1.05})
    band.log({"step": 8, "tokens": 300, "validation_loss": 3.0})
    assert not said and asked == [(200, 0.5), (50, 0.5), (300, 0.5)]
    band.log({"step": 9, "tokens": 400, "validation_bits_per_byte": 1.2})
    band.log({"step": 10, "tokens": 400, "validation_bits_per_byte": 0.2})
    assert len(said) == 1 and "step 9: 1.200 bits per byte are above the forecast" in said[0]
    assert "1.000 bits per byte (0.900 to 1.100)" in said[0]


def test_lines_are_on_disk_as_they_are_logged(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.log({"step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    file.close()


def test_a_line_that_only_begins_to_fit_is_left_out_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file, before = MetricsFile(path, 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    file.log({"step": 1})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
        for _ in range(2):
            with pytest.raises(DiskError, match=f"cannot write {path}: File too large"):
                file.log({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == '{"step": 1}\n'
    file.log({"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_resuming_drops_the_steps_that_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    MetricsFile(path, 2).close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    MetricsFile(path, 0).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize(
    "bad",
    [
        b'{"step": 2, "lo',
        b"",
        b"[]",
        b"3",
        b"{}",
        b'{"step": "2"}',
        b'{"step": null, "loss": 1}',
        b'{"step": 2, "loss": "low"}',
        b'{"step": 2, "loss": [1]}',
        b'{"step": 2, "loss": \xff}',
        b'{"step": 2, "loss": ' + b"1" * 5000 + b"}",
        b'{"step": 2, "loss": ' + b"[" * 5000,
        b'{"step": 2, "step": 3}',
    ],
)
def test_a_line_that_is_no_record_is_named_and_the_others_are_kept(bad: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [{"step": 1, "loss": None}, {"step": 3, "loss": 2.5, "process_tokens_per_second": [1.0, 2.0]}]
    first, second = (json.dumps(line).encode() for line in good)
    path.write_bytes(b"\n".join([first, bad, second, bad, b'{"step": 4, "lo']))
    notices: list[str] = []
    assert read_metrics(path, notices.append) == good
    assert len(notices) == 1 and f"{path}, line 2 is no record of a step (" in notices[0]
    assert "nor are 1 lines after it: left out" in notices[0] and len(notices[0]) < len(str(path)) + 200
    MetricsFile(path, 3, notices.append).close()
    assert read_metrics(path, pytest.fail) == good and len(notices) == 2


def test_means_do_not_depend_on_how_many_were_measured_at_a_time() -> None:
    whole, parts = RunningMetrics(), RunningMetrics()
    whole.add({"loss": 6.0, "kl": 3.0}, 3)
    parts.add({"loss": 5.0, "kl": 1.0}, 1)
    parts.add({"loss": 1.0, "kl": 2.0}, 2)
    parts.add({"rounds": 4})
    assert whole.take() == {"loss": 2.0, "kl": 1.0}
    assert parts.take() == {"loss": 2.0, "kl": 1.0, "rounds": 4.0} and parts.take() == {}


def test_every_tracker_takes_the_same_numbers(small: Recipe, train: Train, tmp_path: Path) -> None:
    _, recorder = train(small)
    assert recorder.logged and read_metrics(tmp_path / "run" / "metrics.jsonl") == recorder.logged


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The lines in the files of every time that a run was recorded offline, in order, without wandb's own values."""
    wandb = pytest.importorskip("wandb")
    record_type = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    # What it still holds is on disk when it has ended.
    wandb.teardown()
    lines = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        # LevelDB's log format, after wandb's 7 bytes: checksum, length and kind, then the record, whole within a block.
        log = path.read_bytes()[7:]
        assert len(log) < 2**15
        while log:
            length = int.from_bytes(log[4:6], "little")
            record, log = record_type.FromString(log[7 : 7 + length]), log[7 + length :]
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                lines.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return lines


def test_wandb_records_offline_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    said: list[str] = []
    tracker = Wandb(tmp_path, "run", {"model": {"width": 16}}, said.append)
    tracker.log({"step": 1, "loss": 2.0})
    tracker.log({"step": 2, "loss": 1.5})
    # A step that has passed: after a resume, or an evaluation of an older checkpoint.
    tracker.log({"step": 1, "validation_loss": 3.0})
    tracker.close()
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 1, "validation_loss": 3.0}]
    assert recorded(tmp_path) == lines
    assert any("offline" in line for line in said)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    identity = (tmp_path / "wandb-id").read_text()
    Wandb(tmp_path, "run", {}, said.append).close()
    assert (tmp_path / "wandb-id").read_text() == identity
    # What a process that was killed may not have written is recorded again.
    again = tmp_path / "again"
    again.mkdir()
    Wandb(again, "run", {}, said.append, lines[:2]).close()
    assert recorded(again) == lines[:2]


def test_wandb_gets_every_line_at_its_step_also_where_that_has_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    # It reads its environment once.
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logged = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        tracker = Wandb(tmp_path, "run", {}, print)
        for line in logged[:2]:
            tracker.log(line)
        tracker.close()
        # Resumed after a crash: the third line was never sent, and the second step is done again.
        tracker = Wandb(tmp_path, "run", {}, print, logged)
        tracker.log({"step": 2, "loss": 0.4})
        tracker.log({"step": 1, "evaluation/loss": 0.6})
        tracker.close()
        wandb.teardown()
        (run,) = server.history
    lines = [{key: value for key, value in row.items() if key[0] != "_"} for row in server.rows(run)]
    assert lines == [*logged, {"step": 2, "loss": 0.4}, {"step": 1, "evaluation/loss": 0.6}]
    every, step = json.loads(server.config[run])["_wandb"]["value"]["m"]
    # By the numbers of wandb's protocol: a glob, and the step that lies under it, as the number of its definition.
    assert (every["2"], every["5"], step["1"]) == ("*", 2, "step")


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """wandb with a login, and with a server that is not there."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads its environment once
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(tracking, "BEGIN_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "END_SECONDS", 0.5)
    return wandb


@pytest.mark.parametrize(("key", "why"), [("0" * 40, "wandb: "), ("short", "WANDB_API_KEY invalid")])
def test_wandb_goes_offline_with_one_line_where_it_has_no_answer_or_no_key(
    key: str, why: str, online: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    said: list[str] = []
    tracker = Wandb(tmp_path, "run", {}, said.append)
    tracker.log({"step": 1, "loss": 2.0})
    tracker.run.finish()
    (line,) = said
    assert why in line and "so it records offline; send it later with `wandb sync`" in line
    assert recorded(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_wandb_server_that_dies_does_not_hold_the_run(
    online: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "BEGIN_SECONDS", 60)
    said: list[str] = []
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        tracker = Wandb(tmp_path, "run", {}, said.append)
    tracker.log({"step": 1, "loss": 2.0})
    tracker.close()
    assert len(said) == 1 and f"no answer; send the rest later: wandb sync {tmp_path}" in said[0]

    def gone(*_: object) -> None:
        raise ConnectionResetError("wandb-core is gone")

    monkeypatch.setattr(tracker.run, "log", gone)
    tracker.log({"step": 2})
    tracker.log({"step": 3})
    assert len(said) == 2 and "wandb-core is gone" in said[1] and "training goes on without it" in said[1]


def test_a_mode_that_wandb_does_not_know_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with pytest.raises(InputError, match="WANDB_MODE is 'nonsense'; wandb knows online, offline, "):
        require_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_wandb()
