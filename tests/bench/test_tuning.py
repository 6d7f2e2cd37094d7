"""The sweep over tile rows: which candidates there are, what becomes of one that dies or hangs, and what is pasted."""

import itertools
import os
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import tuning
from bench.harness import Case, Figures, check
from bench.kernels import attention
from engine.runtime import Runtime
from kernels import tiles
from kernels.tiles import Tile

KEY = ("forward", "sm_90", 64)


def behave(tile: Tile) -> dict[str, Any]:
    """What a candidate can do to its process, by its number of queries."""
    if tile.queries == 1:
        os._exit(6)
    if tile.queries == 2:
        time.sleep(600)
    if tile.queries == 3:
        raise ValueError("out of resources")
    return {"seconds": tile.queries / 1000}


def rows(*queries: int) -> list[Tile]:
    return [Tile(each, 64, 4, 2) for each in queries]


def test_a_candidate_that_dies_hangs_or_fails_costs_only_itself() -> None:
    # The first answer includes the start of a process, which may be slow: only the row that hangs is waited for.
    assert list(tuning.in_processes(behave, rows(8, 1, 3, 9), 120)) == [
        {"seconds": 0.008},
        {"reason": "the process ended with 6"},
        {"reason": "ValueError: out of resources"},
        {"seconds": 0.009},
    ]
    assert list(tuning.in_processes(behave, rows(2), 0.5)) == [{"reason": "no answer within 0.5 s"}]


def test_only_what_is_right_is_timed() -> None:
    lines = list(tuning.try_all(rows(3, 9, 8), behave, partial(behave), workers=2))
    assert [line.get("seconds") for line in lines] == [None, 0.009, 0.008]
    assert lines[0]["tile"]["queries"] == 3 and "out of resources" in lines[0]["reason"]


def test_candidates_are_the_table_and_a_grid_about_it() -> None:
    for (key, known), short in itertools.product(tiles.TABLE.items(), (False, True)):
        found = tuning.candidates(key, known, short)
        now = [replace(tile, longest=None) for tile in known]
        assert found[: len(now)] == now and len(set(found)) == len(found) < 120
        for tile in found[len(now) :]:
            assert tile.descriptors == (key[1] != "sm_80" and not short) and tile.longest is None
    key = ("keys", "sm_80", 64)
    assert {tile.keys for tile in tuning.candidates(key, tiles.TABLE[key], False)} == {64, 128}


def test_the_fastest_row_is_ready_to_paste() -> None:
    fast, now, wrong = Tile(128, 64, 4, 3, True, False), Tile(128, 128, 8, 2), Tile(64, 64, 8, 2)
    lines: list[dict[str, Any]] = [{"tile": vars(fast), "seconds": 0.001}, {"tile": vars(now), "seconds": 0.0015}]
    lines.append({"tile": vars(wrong), "reason": "wrong"})
    for length, longest in ((4096, None), (512, 512)):
        pasted = tuning.row(KEY, lines, replace(now, longest=longest), length)
        found = eval("{" + pasted.partition("#")[0] + "}", {"Tile": Tile})
        assert found == {KEY: (replace(fast, longest=longest),)}
        assert f"at T {length:,}, causal: 1.000 ms; before 1.500" in pasted
    assert "no row ran" in tuning.row(KEY, [{"tile": vars(now), "reason": "spilled"}], now, 512)


def test_a_candidate_runs_with_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, interpreted: the row that is tried is the row that launches."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    monkeypatch.setenv("GPT_KERNELS", "triton")
    monkeypatch.setattr(tiles, "TABLE", dict(tiles.TABLE))
    runtime = Runtime(torch.device("cpu"), "fp32")

    def small_check(case: Case, *rest: Any) -> Figures:
        return check(attention(runtime, 32, True, 40, 1, 32), *rest)

    seen: list[Tile] = []

    chosen = tiles.tile

    def tile(*arguments: Any) -> Tile:
        seen.append(chosen(*arguments))
        return seen[-1]

    monkeypatch.setattr(tiles, "tile", tile)
    row = Tile(16, 16, 4, 1)
    for kernel in tuning.DIRECTION:
        verdict = tuning.tried(small_check, (kernel, "fp32", 32), runtime, 512, 1, row)
        assert verdict["relative_error"] < 1e-3
        assert row in seen
        seen.clear()
