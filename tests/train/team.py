"""Processes for tests, forked from one that has imported everything: some that train together, or a command."""

import importlib
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from engine.config import Recipe, from_dict, to_dict
from engine.run import Run

IMPORTED = [
    "tests.train.team",
    "rlhf.align",
    "train.pretrain",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*IMPORTED, "torch.distributed.run", "torch.distributed.launcher", "cli.main"])

# What a worker does to itself before it trains, by its rank.
Trick = Callable[[int], None]


def start(recipe: Recipe, run: Path, count: int, *, trick: Trick | None = None) -> list[BaseProcess]:
    """Begin to train, or go on with, a run on so many processes. What they say is left in NAME-RANK.json."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = (json.dumps(to_dict(recipe)), str(run), count, port, trick)
    return [_fork(_work, rank, *arguments) for rank in range(count)]


def train_on(recipe: Recipe, run: Path, count: int, *, trick: Trick | None = None) -> list[dict[str, Any]]:
    """Train to the end, and return what each process said."""
    workers = start(recipe, run, count, trick=trick)
    for worker in workers:
        worker.join(120)
    told = [said(run, rank) for rank in range(count)]
    assert [worker.exitcode for worker in workers] == [0] * count, told
    return told


def said(run: Path, rank: int) -> dict[str, Any]:
    return json.loads(run.with_name(f"{run.name}-{rank}.json").read_text())


def command(log: Path, *words: str) -> BaseProcess:
    """Begin `gpt ...`, or `torchrun ...`; what it and its children print is left in the file."""
    return _fork(_command, str(log), words)


def _fork(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = CONTEXT.Process(target=work, args=arguments)
    process.start()
    return process


def _command(log: str, words: tuple[str, ...]) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = list(words)
    module = importlib.import_module("torch.distributed.run" if words[0] == "torchrun" else "cli.main")
    module.main()


def _work(rank: int, recipe_text: str, folder: str, count: int, port: int, trick: Trick | None) -> None:
    import torch

    from engine.processes import join
    from engine.runtime import Runtime, measured_peak
    from rlhf.align import align
    from tests.train.conftest import Recorder
    from train import trainer
    from train.finetune import finetune
    from train.pretrain import pretrain

    torch.set_num_threads(1)
    # Seconds of measuring and of drawing, in each.
    trainer.measured_peak = lambda runtime: measured_peak(runtime, 0.0)  # type: ignore[assignment, misc]
    trainer.write_report = lambda *arguments: None
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    recipe, run = from_dict(json.loads(recipe_text)), Run(Path(folder))
    device, recorder = torch.device("cpu"), Recorder()
    processes = join(device, recipe.loop.timeout_minutes)
    if trick:
        trick(rank)
    told: dict[str, Any] = {"said": recorder.said, "failure": ""}
    try:
        runtime = Runtime(device, "fp32", processes)
        begin = align if recipe.alignment.method != "none" else pretrain if recipe.base is None else finetune
        outcome = begin(recipe, run, runtime, recorder, resume=run.config.exists())
        told |= {"step": outcome.step, "evaluation": outcome.evaluation}
    except Exception as error:
        told["failure"] = f"{type(error).__name__}: {error}"
    run.path.with_name(f"{run.path.name}-{rank}.json").write_text(json.dumps(told))
    if told["failure"]:
        # Without leave: what is lost cannot be left in peace.
        os._exit(1)
    torch.distributed.destroy_process_group() if count > 1 else None
