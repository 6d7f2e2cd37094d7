"""What `gpt watch` reads of runs, while they are written and after, and what it does not let out."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cli.watching import files
from cli.watching.app import create_app
from engine import records
from engine.config import Recipe, override, preset, to_dict
from engine.folders import LOCK
from tests.cli.conftest import Gpt

# Held as by a training, which is another process.
HOLD = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


def make_run(folder: Path, lines: int = 10, planned: int = 10, *, noise: float = 0.0, **settings: Any) -> Path:
    """A run by its files alone: an evaluation and samples after every fifth step."""
    recipe: Recipe = preset("nano")
    for name, value in settings.items():
        recipe = override(recipe, name.replace("__", "."), value)
    folder.mkdir(parents=True)
    content = {"recipe": to_dict(recipe), "asked": {}, "folder": str(folder), "versions": {}}
    (folder / "config.json").write_text(records.dumps(content))
    (folder / "metrics.jsonl").touch()
    add_steps(folder, range(1, lines + 1), planned, noise)
    return folder


def add_steps(run: Path, steps: range, planned: int = 10, noise: float = 0.0) -> None:
    with open(run / "metrics.jsonl", "a") as metrics, open(run / "samples.md", "a") as samples:
        for step in steps:
            loss = 4 / step + 1 + noise
            line = {"step": step, "loss": loss, "bits_per_byte": loss / 3, "gradient_norm": 0.5, "rate": 1.0}
            line |= {"tokens": 100 * step, "tokens_per_second": 50.0, "seconds": 2.0 * step, "memory": 2**30}
            metrics.write(json.dumps({**line, "progress": step / planned}) + "\n")
            if step % 5 == 0:
                metrics.write(json.dumps({"step": step, "tokens": 100 * step, "validation_loss": loss + 0.1}) + "\n")
                samples.write(f"## Step {step:,}\n\n> Who?\n\nA <b>fox</b> at {step}.\n\n---\n\nAn owl.\n\n")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def client(runs: Path) -> TestClient:
    runs.mkdir()
    return TestClient(create_app(runs, key=None, hosts={"testserver"}))


Ask = Callable[..., Any]


@pytest.fixture
def ask(client: TestClient) -> Ask:
    def get(path: str, **query: Any) -> Any:
        answer = client.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return get


def named(ask: Ask) -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in ask("/runs.json")["runs"]}


def test_the_list_says_what_each_run_is_and_which_one_is_alive(runs: Path, ask: Ask) -> None:
    make_run(runs / "base")
    make_run(runs / "deep" / "chat", 7, base="../../base", chat=True)
    for name in ("alive", "silent"):
        make_run(runs / name, 4)
    (make_run(runs / "broken") / "config.json").write_text('{"recipe": 3}')
    (runs / "no run").mkdir()
    before = contents(runs)
    os.utime(runs / "silent" / "metrics.jsonl", (0, time.time() - 61))
    hold = [sys.executable, "-c", HOLD]
    trainings = [
        subprocess.Popen([*hold, runs / name / LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name in ("alive", "silent")
    ]
    for training in trainings:
        assert training.stdout is not None and training.stdout.readline()
    found = named(ask)
    states = {name: run["state"] for name, run in found.items()}
    for training in trainings:
        training.communicate(b"\n")
    assert states == {
        "base": "done",
        "deep/chat": "stopped",
        "alive": "running",
        "silent": "stalled",
        "broken": "damaged",
    }
    chat = found["deep/chat"]
    assert (chat["kind"], chat["step"], chat["steps"], chat["base_run"]) == ("finetune", 7, 10, found["base"]["id"])
    assert chat["newest"]["loss"] == 4 / 7 + 1 and chat["newest"]["validation_loss"] == pytest.approx(1.9)
    assert found["base"]["parameters"] == preset("nano").model.parameters and found["base"]["kind"] == "pretrain"
    assert "recipe" in found["broken"]["damage"] and found["base"]["damage"] == ""
    assert named(ask)["alive"]["state"] == "stopped"
    for lock in ("alive", "silent"):
        (runs / lock / LOCK).unlink()
    assert contents(runs) == before


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_only_what_is_new_is_read_and_a_resumed_run_from_its_beginning(runs: Path, ask: Ask) -> None:
    run = make_run(runs / "a", 6)
    name = named(ask)["a"]["id"]

    def more(since: dict[str, Any]) -> Any:
        return ask(f"/metrics/{name}", start=since["next"], tag=since["tag"], every=since["every"])

    first = ask(f"/metrics/{name}")
    assert first["train"]["step"] == [1, 2, 3, 4, 5, 6] and first["train"]["memory"] == [2**30] * 6
    assert first["measured"]["step"] == [5] and first["measured"]["validation_loss"] == pytest.approx([1.9])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('no JSON\n[1]\n{"step": "1"}\n' + "[" * 100_000 + '\n{"step": 7, "loss": NaN, "x": 1e999, "pr')
    second = more(first)
    assert (second["start"], second["skipped"], second["train"]) == (first["next"], 4, {})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('ogress": 0.7, "process_tokens_per_second": [1.0]}\n')
    third = more(second)
    assert third["train"] == {"step": [7], "progress": [0.7]}
    # As a resume does: lines after the checkpoint go, and others come, until there are more than before.
    (run / "metrics.jsonl").unlink()
    add_steps(run, range(1, 6))
    assert more(third)["train"]["step"] == [1, 2, 3, 4, 5]
    add_steps(run, range(6, 60), noise=0.5)
    assert more(third)["train"]["step"] == [*range(1, 60)]
    # It is longer than it was when it was first read, and not what it was.
    assert more(first)["train"]["step"] == [*range(1, 60)]
    (run / "metrics.jsonl").unlink()
    assert more(first)["next"] == 0 and named(ask)["a"]["step"] == 0


def test_of_a_long_run_a_point_is_the_mean_of_several_lines(
    runs: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "POINTS", 100)
    monkeypatch.setattr(files, "CHUNK_BYTES", 50_000)
    make_run(runs / "long", 1000, 1000)
    name, answers = named(ask)["long"]["id"], []
    since: dict[str, Any] = {"next": 0, "tag": "", "every": 1, "more": True}
    while since["more"]:
        since = ask(f"/metrics/{name}", start=since["next"], tag=since["tag"], every=since["every"])
        answers.append(since)
    step, loss, rate = ([value for each in answers for value in each["train"][of]] for of in ("step", "loss", "rate"))
    assert len(answers) > 3 and 80 < len(step) < 130 and step == sorted(step) and step[-1] == 1000
    every = answers[0]["every"]
    assert step[0] == every and loss[0] == pytest.approx(sum(4 / n + 1 for n in range(1, every + 1)) / every)
    assert set(rate) == {1.0}
    assert [value for each in answers for value in each["measured"]["step"]] == [*range(5, 1001, 5)]


def test_samples_settings_and_the_best_of_n(runs: Path, ask: Ask) -> None:
    run = make_run(runs / "a", 10)
    points = [{"n": 1, "kl": 0.0, "gold": 0.4}, {"n": 2, "kl": 0.19, "gold": 0.5}]
    (run / "best-of-n.json").write_text(json.dumps({"curves": {"best of n": points, "ppo": points[:1]}}))
    found = named(ask)["a"]
    assert found["best_of_n"] == {"best of n": points}
    fox, owl = "> Who?\n\nA <b>fox</b> at 10.", "An owl."
    assert ask(f"/samples/{found['id']}")[1] == {"step": 10, "texts": [fox, owl]}
    assert ask(f"/settings/{found['id']}")["optimizer.kind"] == "normuon"
    (run / "best-of-n.json").write_text("[]")
    assert named(ask)["a"]["best_of_n"] == {}


def test_nothing_outside_of_the_folder_is_read(runs: Path, client: TestClient, ask: Ask, tmp_path: Path) -> None:
    secret, run = make_run(tmp_path / "secret", 3), make_run(runs / "a", 1)
    for name in ("metrics.jsonl", "samples.md"):
        (run / name).unlink()
        (run / name).symlink_to(secret / name)
    (found,) = ask("/runs.json")["runs"]
    assert (found["name"], found["samples"], found["newest"]) == ("a", 0, {})
    assert ask(f"/samples/{found['id']}") == [] and ask(f"/metrics/{found['id']}")["next"] == 0
    for path in (
        "/metrics/a",
        "/samples/..%2Fsecret",
        "/settings/%2e%2e",
        "/..%2f..%2fsecret/metrics.jsonl",
        "/app.py",
    ):
        assert client.get(path).status_code == 404, path
    # Inside of the folder a link may lead where it wants, and a run may be one.
    (run / "metrics.jsonl").unlink()
    make_run(runs / "b", 2)
    (run / "metrics.jsonl").symlink_to(runs / "b" / "metrics.jsonl")
    assert ask(f"/metrics/{found['id']}")["train"]["step"] == [1, 2]
    (runs / "linked").symlink_to(secret)
    linked = named(ask)["linked"]
    assert (linked["step"], ask(f"/metrics/{linked['id']}")["train"]["step"]) == (3, [1, 2, 3])


def test_odd_names_are_runs_like_others(runs: Path, ask: Ask) -> None:
    odd = ["a..", "a#?%2e b", "\u00e4\u2603", "x\udcff", "line\nbreak"]
    for name in odd:
        make_run(runs / name, 1)
    found = ask("/runs.json")["runs"]
    assert {run["name"] for run in found} == {name.replace("\udcff", "\ufffd") for name in odd}
    assert all(ask(f"/metrics/{run['id']}")["train"]["step"] == [1] for run in found)


def test_damage_is_told_whatever_the_name_and_what_looks_like_a_step(runs: Path, client: TestClient, ask: Ask) -> None:
    run = make_run(runs / "x\udcff", 5)
    (run / "config.json").write_text('{"recipe": 3}')
    with open(run / "samples.md", "a") as file:
        file.write("## Step ,\n\nA line of the model's.\n")
    (found,) = ask("/runs.json")["runs"]
    refused = client.get(f"/settings/{found['id']}")
    assert refused.status_code == 503 and "x\ufffd/config.json is damaged" in refused.json()["detail"]
    assert [each["step"] for each in ask(f"/samples/{found['id']}")] == [5]


def test_who_may_ask(runs: Path, client: TestClient, gpt: Gpt) -> None:
    assert client.get("/runs.json", headers={"Host": "elsewhere.example"}).status_code == 400
    assert client.post("/runs.json").status_code == 405
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    locked = TestClient(create_app(runs, key="secret", hosts=None))
    answers = [locked.get("/runs.json", headers={"Authorization": f"Bearer {key}"}) for key in ("wrong", "secret")]
    assert [answer.status_code for answer in answers] == [401, 200]
    assert locked.get("/").status_code == 200
    refused = gpt("watch", str(runs), "--host", "0.0.0.0")
    assert refused.code == 2 and "--host 0.0.0.0 lets others in" in refused.err
    refused = gpt("watch", "nowhere")
    assert refused.code == 2 and "there is no folder nowhere" in refused.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = gpt("watch", str(runs), "--port", str(taken.getsockname()[1]))
    assert refused.code == 2 and "Address already in use); choose another one" in refused.err


def test_a_training_keeps_the_memory_that_torch_would_take() -> None:
    look = "import sys, cli.watch, cli.watching.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
