"""One command in many processes: started by --gpus or by torchrun, and alive whatever dies."""

import importlib.util
import json
import os
import random
import re
import resource
import signal
import socket
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from cli.launch import PRELOADED, judging_agent, parse_nodes
from engine.checkpoint import latest
from engine.errors import InputError
from engine.run import Run
from tests.train import conftest
from tests.train.team import command, train_on
from train.tracking import read_metrics

stories = conftest.prepared
SETTINGS = {
    "model.width": 16,
    "model.blocks": 2,
    "model.heads": 2,
    "model.context": 32,
    "loop.batch": 4,
    "loop.samples": 0,
    "loop.save_every": 2,
    "loop.evaluate_every": 10_000,
    "data.final_evaluation_tokens": 300,
}


def train(stories: Path, out: Path, steps: int, *options: str) -> list[str]:
    settings = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    fixed = ["--data", str(stories), "--out", str(out), "--steps", str(steps), "--device", "cpu", "--precision", "fp32"]
    return ["train", "nano", *fixed, *settings, *options]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line}


def again(out: Path, count: int) -> dict[int, float]:
    """The losses of the same run, undisturbed and on so many processes."""
    other = out.with_name("undisturbed")
    train_on(Run(out).read_recipe(), other, count)
    return losses(other)


def test_torchrun_starts_the_same_command_and_one_process_speaks(stories: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "many", tmp_path / "log"
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "cli"]
    started = command(log, *torchrun, *train(stories, out, 6, "--shard"))
    started.join(300)
    said = log.read_text()
    assert started.exitcode == 0 and said.count("report ") == 1, said
    assert "processes  2, a share of the model on each (FSDP)" in said
    assert losses(out) == pytest.approx(again(out, 1), rel=1e-3)


def test_what_cannot_work_ends_all_processes_with_one_sentence(tmp_path: Path) -> None:
    started = command(tmp_path / "log", "gpt", *train(tmp_path / "none.txt", tmp_path / "run", 2, "--gpus", "2"))
    started.join(300)
    said = (tmp_path / "log").read_text()
    assert started.exitcode == 2 and said.count("error: ") == 1 and "none.txt" in said, said


def test_a_disk_that_refuses_ends_all_processes_at_once_with_one_sentence(stories: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    started = command(log, "gpt", *train(stories, out, 8, "--gpus", "2", "--set", "model.width=64"))
    assert started.pid is not None
    # The processes that it starts inherit this: no file of a checkpoint may be so large.
    resource.prlimit(started.pid, resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    started.join(300)
    said = log.read_text()
    assert started.exitcode == 2 and said.count("error: ") == 1 and "Traceback" not in said, said
    assert "step-00000004: File too large" in said and f"go on with: gpt train nano --out {out} --resume" in said
    assert not list((out / "checkpoints").iterdir())


def failed(code: int, what: str, tmp_path: Path) -> ProcessFailure:
    file = tmp_path / "error.json"
    content = {"message": {"message": what, "extraInfo": {"timestamp": "0"}}}
    file.write_text(json.dumps(content)) if what else file.unlink(missing_ok=True)
    return ProcessFailure(0, 1, code, str(file))


@pytest.mark.parametrize(
    ("failures", "restarts"),
    [
        ([(-9, ""), (-9, ""), (1, "")], True),
        ([(1, "TypeError in step 3"), (-9, ""), (1, "TypeError in step 3")], True),
        ([(1, "TypeError in step 3"), (1, "TypeError in step 5")], True),
        ([(1, "TypeError in step 3"), (1, "TypeError in step 3")], False),
        ([(2, "")], False),
    ],
)
def test_workers_start_again_unless_the_same_would_come_again(
    failures: list[tuple[int, str]], restarts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = object.__new__(judging_agent())
    agent._remaining_restarts = 20
    for failure in failures:
        result = RunResult(WorkerState.FAILED, failures={0: failed(*failure, tmp_path)})
        monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, group, result=result: result)
        assert agent._remaining_restarts == 20 and agent._monitor_workers(None) is result
    assert agent._remaining_restarts == (20 if restarts else 0)


def test_what_workers_are_forked_with_is_there() -> None:
    assert all(importlib.util.find_spec(name) for name in PRELOADED)


@pytest.mark.parametrize("nodes", ["0", "2:1", "a:b", "9" * 5000, "1:" + "9" * 5000])
def test_nodes_are_a_number_or_a_range(nodes: str) -> None:
    assert parse_nodes(None) == (1, 1) and parse_nodes("3") == (3, 3) and parse_nodes("1:4") == (1, 4)
    with pytest.raises(InputError, match="MIN:MAX"):
        parse_nodes(nodes)


def children(process: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process:
            found.append(int(stat.parent.name))
    return found


def newest(out: Path) -> int:
    names = [re.fullmatch(r"step-(\d+)", path.name) for path in (out / "checkpoints").glob("step-*")]
    return max((int(name[1]) for name in names if name), default=0)


def test_killed_ten_times_at_random_the_workers_come_back_and_end_as_if_undisturbed(
    stories: Path, tmp_path: Path
) -> None:
    steps, out, log = 120, tmp_path / "killed", tmp_path / "log"
    chance, reached = random.Random(3), [0]
    agent = command(log, "gpt", *train(stories, out, steps, "--gpus", "2"))
    assert agent.pid is not None
    for _ in range(10):
        # On past the last kill, by a checkpoint at least, and then at any moment of a step or a save.
        workers: list[int] = []
        while agent.is_alive() and (newest(out) <= reached[-1] or len(workers) < 2):
            time.sleep(0.02)
            workers = [worker for server in children(agent.pid) for worker in children(server)]
        time.sleep(chance.uniform(0, 0.03))
        reached.append(newest(out))
        os.kill(chance.choice(workers), signal.SIGKILL)
    agent.join(300)
    assert agent.exitcode == 0, log.read_text()[-3000:]
    assert reached[-1] < steps
    disturbed, undisturbed = losses(out), again(out, 2)
    assert list(disturbed) == list(undisturbed) == list(range(1, steps + 1))
    assert disturbed[steps] == pytest.approx(undisturbed[steps], rel=1e-6)
    found = latest(out / "checkpoints")
    assert found is not None and found.step == steps


def kill(agent: int | None) -> None:
    """As if the machine lost its power: the agent, and all that it started."""
    assert agent is not None
    servers = children(agent)
    for process in [agent, *servers, *(worker for server in servers for worker in children(server))]:
        os.kill(process, signal.SIGKILL)


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_grows_when_a_machine_comes_and_shrinks_when_one_is_lost(stories: Path, tmp_path: Path) -> None:
    steps, out = 100, tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as server:
        meeting = f"localhost:{server.getsockname()[1]}"
    words = train(stories, out, steps, "--nodes", "1:2", "--rendezvous", meeting, "--set", "loop.save_every=1")
    first = command(tmp_path / "first", "gpt", *words)
    wait_for(lambda: newest(out) >= 2)
    second = command(tmp_path / "second", "gpt", *words)
    wait_for(lambda: sizes(out).count(2) > 4)
    kill(second.pid)
    first.join(120)
    assert first.exitcode == 0, (tmp_path / "first").read_text()[-3000:]
    assert [size for size, _ in groupby(sizes(out))] == [1, 2, 1]
    assert losses(out) == pytest.approx(again(out, 1), rel=1e-3)


def sizes(out: Path) -> list[int]:
    """How many processes took each step."""
    return [len(line.get("process_tokens_per_second", [0])) for line in read_metrics(out / "metrics.jsonl")]
