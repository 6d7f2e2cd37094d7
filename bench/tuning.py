"""Time rows of kernels/tiles.py on this GPU: which is the fastest for each attention kernel and head dim?

A compiler that meets a failed assertion ends its process, and a wrong kernel may never end: candidates run in processes
of their own. First all of them, several at a time: that compiles them, into Triton's cache on disk, and compares them
with float64. Those that are right are then timed, one after the other.
"""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.attention import Shape, check, timed
from bench.timing import outcome
from engine.runtime import Runtime
from kernels import tiles
from kernels.tiles import Tile

KERNELS = ("forward", "keys", "queries")
LENGTH, BATCH = 4096, 4
# For one candidate, the start of its process included. A kernel that takes so long is of no use.
COMPILE_SECONDS, TIMING_SECONDS = 90, 30
# The server imports torch once and never touches the GPU: its children start in no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "triton", "bench.tuning"])

Key = tuple[str, str, int]
Task = Callable[[Tile], dict[str, Any]]


def tune(runtime: Runtime, head_dims: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The result so far, after every kernel and head dim: causal, as training runs.

    `tuned` holds every candidate, fastest first, with its seconds or the `reason` why it has none, and the fastest as a
    `row` to paste into the table. For "keys" and "queries" the whole backward is timed, the other kernels as they are.
    """
    major, minor = torch.cuda.get_device_capability(runtime.device)
    family = tiles.family(10 * major + minor, runtime.dtype.itemsize)
    result: dict[str, Any] = {"precision": runtime.precision, "length": LENGTH, "batch": BATCH, "tuned": []}
    for head_dim, kernel in itertools.product(head_dims, KERNELS):
        key = (kernel, family, head_dim)
        now = tiles.TABLE[key][0]
        lines = list(try_all(candidates(key), partial(checked, key, runtime), partial(clocked, key, runtime)))
        lines.sort(key=lambda line: line.get("seconds", float("inf")))
        result["tuned"].append({"kernel": kernel, "head_dim": head_dim, "row": row(key, lines, now), "timings": lines})
        yield result


def candidates(key: Key) -> list[Tile]:
    """The rows of the table, then a grid about them."""
    kernel, family, _ = key
    # The program of "keys" holds a block of keys and walks over the queries; the others the other way about.
    queries, keys = ((32, 64, 128), (64, 128)) if kernel == "keys" else ((64, 128), (32, 64, 128))
    stages = (2, 3) if kernel == "keys" else (2, 3, 4)
    grid = [Tile(*sizes) for sizes in itertools.product(queries, keys, (4, 8), stages)]
    if kernel == "keys":
        grid += [replace(tile, split=False) for tile in grid]
    if family == "sm_90":
        grid += [replace(tile, descriptors=True) for tile in grid]
    if kernel == "forward":
        grid += [replace(tile, specialize=True) for tile in grid if tile.descriptors and tile.warps == 4]
    return list(dict.fromkeys([*tiles.TABLE[key], *grid]))


def try_all(rows: Sequence[Tile], check: Task, clock: Task, workers: int | None = None) -> Iterator[dict[str, Any]]:
    """A line for each row: its tile, and what `check` and, where that gives no reason against it, `clock` say."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        checks = list(pool.map(lambda tile: next(in_processes(check, [tile], COMPILE_SECONDS)), rows))
    right = [tile for tile, verdict in zip(rows, checks, strict=True) if "reason" not in verdict]
    times = dict(zip(right, in_processes(clock, right, TIMING_SECONDS), strict=True))
    for tile, verdict in zip(rows, checks, strict=True):
        yield {"tile": vars(tile), **verdict, **times.get(tile, {})}


def in_processes(task: Task, rows: Sequence[Tile], seconds: float) -> Iterator[dict[str, Any]]:
    """What `task` says of each row, run in a process that is started anew where a row kills it or takes too long."""
    waiting = list(rows)
    while waiting:
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=serve, args=(sender, task, waiting), daemon=True)
        process.start()
        sender.close()
        alive = True
        try:
            while waiting and alive:
                try:
                    alive = receiver.poll(seconds)
                    line = receiver.recv() if alive else {"reason": f"no answer within {seconds} s"}
                except EOFError:
                    process.join()
                    alive, line = False, {"reason": f"the process ended with {process.exitcode}"}
                waiting.pop(0)
                yield line
        finally:
            process.kill()
            process.join()


def serve(sender: Connection, task: Task, rows: Sequence[Tile]) -> None:
    # What the compiler prints when it gives up fills screens.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for tile in rows:
        sender.send(outcome(task, tile))


def checked(key: Key, runtime: Runtime, tile: Tile) -> dict[str, Any]:
    """As many heads as are timed: Triton compiles anew for a number of another kind."""
    tiles.TABLE[key] = (tile,)
    return check("ours", Shape(key[2], True, length=512, batch=1), direction(key), runtime)


def clocked(key: Key, runtime: Runtime, tile: Tile) -> dict[str, Any]:
    tiles.TABLE[key] = (tile,)
    return timed("ours", Shape(key[2], True, LENGTH, BATCH), direction(key), runtime)


def direction(key: Key) -> str:
    return "forward" if key[0] == "forward" else "backward"


def row(key: Key, lines: Sequence[dict[str, Any]], now: Tile) -> str:
    """The fastest line as the table writes it, beside the time of the row that runs now."""
    best = lines[0]
    if "seconds" not in best:
        return f"# {key}: no row ran: {best['reason']}"
    was = next((line["seconds"] for line in lines if line["tile"] == vars(now) and "seconds" in line), None)
    tile = best["tile"]
    written = ", ".join(
        str(tile[field.name]) if field.default is MISSING else f"{field.name}={tile[field.name]}"
        for field in fields(Tile)
        if tile[field.name] != field.default
    )
    before = "did not run" if was is None else f"{1e3 * was:.3f}"
    kernel, family, head_dim = key
    return (
        f'("{kernel}", "{family}", {head_dim}): (Tile({written}),),  '
        f"# {direction(key)} at T {LENGTH:,}, causal: {1e3 * best['seconds']:.3f} ms; before {before}"
    )
