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

from bench.harness import Figures, check, outcome, timed
from bench.kernels import attention
from engine.runtime import Runtime
from kernels import tiles
from kernels.tiles import Tile

DIRECTION = {"forward": "forward", "keys": "backward", "queries": "backward"}
# Lengths, for rows without an end and for those up to it, and the batch of each.
BATCHES = {4096: 4, 512: 32}
# The seconds that one candidate may take, the start of its process included. A slower kernel is of no use.
COMPILE_SECONDS, TIMING_SECONDS = 90, 30
# The server imports torch once and never touches the GPU: its children start in no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "triton", "bench.tuning"])

Key = tuple[str, str, int]
Task = Callable[[Any], Figures]


def tune(runtime: Runtime, head_dims: Sequence[int], kernels: Sequence[str] = tuple(DIRECTION)) -> Iterator[Figures]:
    """Yield the result so far, after every kernel, head dim and length: causal, as training runs.

    `tuned` holds every candidate, fastest first, with its seconds or the `reason` why it has none, and the fastest as a
    `row` to paste into the table. For "keys" and "queries" the whole backward is timed, the other kernels as they are.
    """
    major, minor = torch.cuda.get_device_capability(runtime.device)
    family = tiles.family(10 * major + minor, runtime.dtype.itemsize)
    result: Figures = {"precision": runtime.precision, "tuned": []}
    for head_dim, kernel, (length, batch) in itertools.product(head_dims, kernels, BATCHES.items()):
        key = (kernel, family, head_dim)
        known = tiles.rows(kernel, 10 * major + minor, head_dim, runtime.dtype.itemsize)
        now = next(tiles.running(known, length))
        checked = partial(tried, check, key, runtime, 512, 1)
        clocked = partial(tried, timed, key, runtime, length, batch)
        found = try_all(candidates(key, known, short=length < max(BATCHES)), checked, clocked)
        lines = sorted(found, key=lambda line: line.get("seconds", float("inf")))
        about = {"kernel": kernel, "head_dim": head_dim, "length": length, "batch": batch}
        result["tuned"].append({**about, "row": row(key, lines, now, length), "timings": lines})
        yield result


def candidates(key: Key, known: Sequence[Tile], short: bool) -> list[Tile]:
    """Return the rows of the table, for any length, then a grid about them."""
    kernel, family, _ = key
    # The program of "keys" holds a block of keys and walks over the queries; the others the other way about.
    queries, keys = ((32, 64, 128), (64, 128)) if kernel == "keys" else ((64, 128), (32, 64, 128))
    stages = (2, 3) if kernel == "keys" else (2, 3, 4)
    grid = [Tile(*sizes) for sizes in itertools.product(queries, keys, (4, 8), stages)]
    if kernel == "keys":
        grid += [replace(tile, split=False) for tile in grid]
    # Descriptors save registers, and have to be made by each program: short sequences are tried without.
    grid = [replace(tile, descriptors=family != "sm_80" and not short) for tile in grid]
    return list(dict.fromkeys([*(replace(tile, longest=None) for tile in known), *grid]))


def try_all(rows: Sequence[Tile], check: Task, clock: Task, workers: int | None = None) -> Iterator[Figures]:
    """Yield a line for each row: its tile, what `check` says and, unless that is a reason against it, `clock`."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        checks = list(pool.map(lambda tile: next(in_processes(check, [tile], COMPILE_SECONDS)), rows))
    right = [tile for tile, verdict in zip(rows, checks, strict=True) if "reason" not in verdict]
    times = dict(zip(right, in_processes(clock, right, TIMING_SECONDS), strict=True))
    for tile, verdict in zip(rows, checks, strict=True):
        yield {"tile": vars(tile), **verdict, **times.get(tile, {})}


def in_processes(task: Task, rows: Sequence[Any], seconds: float) -> Iterator[Figures]:
    """Yield what `task` says of each row, in a process that is started anew where a row kills it or takes too long."""
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


def serve(sender: Connection, task: Task, rows: Sequence[Any]) -> None:
    # When the compiler gives up, it prints screens full of text.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for tile in rows:
        sender.send(outcome(task, tile))


def tried(measure: Callable[..., Figures], key: Key, runtime: Runtime, length: int, batch: int, tile: Tile) -> Figures:
    """Measure with this row, as many heads to check as to time: Triton compiles anew for another kind of number."""
    tiles.TABLE[key] = (tile,)
    return measure(attention(runtime, key[2], True, length, batch), "ours", DIRECTION[key[0]], runtime)


def row(key: Key, lines: Sequence[Figures], now: Tile, length: int) -> str:
    """Return the fastest line as the table writes it, beside the time of the row that runs now."""
    best = lines[0]
    if "seconds" not in best:
        return f"# {key}: no row ran: {best['reason']}"
    same = vars(replace(now, longest=None))
    was = next((line["seconds"] for line in lines if line["tile"] == same and "seconds" in line), None)
    tile = best["tile"] | {"longest": None if length == max(BATCHES) else length}
    written = ", ".join(
        str(tile[field.name]) if field.default is MISSING else f"{field.name}={tile[field.name]}"
        for field in fields(Tile)
        if tile[field.name] != field.default
    )
    before = "did not run" if was is None else f"{1e3 * was:.3f}"
    kernel, family, head_dim = key
    return (
        f'("{kernel}", "{family}", {head_dim}): (Tile({written}),),  '
        f"# {DIRECTION[kernel]} at T {length:,}, causal: {1e3 * best['seconds']:.3f} ms; before {before}"
    )
