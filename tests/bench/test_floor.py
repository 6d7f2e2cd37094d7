"""Bounds on paper: what is read from a loop, what is made of it, and that no clock has shown more."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import floor
from bench.compile_report import in_processes
from kernels.tiles import Tile, rows

RESULTS = Path(__file__).parents[2] / "bench" / "results"
SASS = """
.L_x_1:
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR32], RZ, !UPT ;
        /*0010*/                   FSEL R1, R2, -INF , P1 ;
        /*0020*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR22+0x10000], R14 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR32], RZ, !UPT ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R88, R148, gdesc[UR8].tnspB, R88 ;
        /*0070*/               @P0 MUFU.EX2 R3, R4 ;
        /*0080*/                   LDSM.16.M88.4 R4, [R5] ;
        /*0090*/                   LDS.64 R6, [R5] ;
        /*00a0*/                   FFMA R1, R2, R3, R4 ;
        /*00b0*/                   F2FP.BF16.F32.PACK_AB R1, R2, R3 ;
        /*00c0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00d0*/                   BRA.U !UP1, `(.L_x_3) ;
        /*00e0*/                   EXIT ;
"""


def test_a_loop_is_read_from_the_assembly() -> None:
    masked, plain = sorted(floor.loops(SASS), key=lambda loop: "FSEL" not in dict(loop))
    assert [len(masked), len(plain)] == [3, 9]
    assert floor.loops("EXIT ;") == []


def test_each_unit_gets_its_clocks() -> None:
    plain = max(floor.loops(SASS), key=len)
    busy = floor.clocks(plain, floor.CHIPS[90], warps=4)
    # 128 bytes a clock: A and B of the first product, B of the second, which four warps share; four matrices of 128
    # bytes and 8 bytes of 32 threads for each warp.
    operands = 2 * 16 * (64 + 128) + 2 * 16 * 64
    assert busy["shared memory"] == operands / 128 + 4 * (4 + 2)
    assert busy["exponentials"] == 4 * 32 / 16
    assert busy["fp32"] == 4 * 32 / 128 and busy["integers"] == 4 * 32 / 64
    assert busy["issue"] == 4 * 9 / 4
    assert floor.clocks([], floor.CHIPS[100], warps=4) == dict.fromkeys(busy, 0)


def test_the_slowest_unit_is_the_limit() -> None:
    plain = SASS[SASS.index(".L_x_3") :]
    chip, tile = floor.CHIPS[90], Tile(64, 128, 4, 2)
    found = floor.bound(plain, chip, "forward", 64, tile, programs=3)
    assert found["limit"] == "tensor" and found["clocks"]["tensor"] == 4 * 64 * 128 * 64 / chip.tensor
    assert found["bound"] == found["in_step"] == pytest.approx(chip.peak) and round(chip.peak / 1e12) == 989
    # One program at a time: its products wait for the rest.
    alone = floor.bound(plain, chip, "forward", 64, tile, programs=1)
    rest = max(value for unit, value in alone["clocks"].items() if unit != "tensor")
    assert alone["in_step"] == pytest.approx(chip.peak * 512 / (512 + rest))
    assert [floor.programs_at_once(90, 4, registers, 74752) for registers in (155, 200)] == [3, 2]
    assert floor.programs_at_once(120, 4, 32, 1024) == 12  # of 48 warps


def test_what_a_kernel_without_products_moves() -> None:
    sass = "/*0000*/ LDG.E.128 R4, [R2.64] ; /*0010*/ EXIT ;".replace(";", ";\n")
    found = floor.stream(sass, floor.CHIPS[90], warps=2, elements=512)
    # 16 bytes of 64 threads; two instructions of two warps, against what a multiprocessor's share of the memory takes.
    assert found["bytes"] == 2 and found["limit"] == "issue"
    chip = floor.CHIPS[90]
    assert found["busy"] == pytest.approx(1 / (1024 * chip.multiprocessors * chip.clock / chip.memory))


def test_rank_correlation() -> None:
    assert floor.rank_correlation([(1, 10), (2, 20), (3, 30)]) == pytest.approx(1)
    assert floor.rank_correlation([(1, 3), (2, 2), (2, 2), (3, 1)]) == pytest.approx(-1)


def recorded(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def test_no_clock_has_shown_more_than_a_bound() -> None:
    """Of the rows that an H200 timed, and of the fastest that it has shown of ours."""
    found = recorded("floor-sm90.json")
    best = {(row["kernel"], row["head_dim"]): 0.0 for row in found["rows"] if "bound" in row}
    for row in (row for row in found["rows"] if row.get("peer") == "ours" and "bound" in row):
        best[row["kernel"], row["head_dim"]] = max(best[row["kernel"], row["head_dim"]], row["bound"])
    assert len(found["timed"]) == 121
    for row in found["timed"]:
        # Two thirds of a timed "keys" or "queries" are other kernels of the backward pass.
        if row["kernel"] == "forward":
            assert row["flops_per_second"] < row["bound"], row
    for point in recorded("attention-nvidia-h200.json")["points"]:
        # A backward pass counts 5 products, and runs 4 in one kernel and 3 in the other.
        keys, queries = best["keys", point["head_dim"]], best["queries", point["head_dim"]]
        most = {"forward": best["forward", point["head_dim"]], "backward": 5 / (4 / keys + 3 / queries)}
        for direction, limit in most.items():
            assert point[direction]["ours"]["flops_per_second"] < limit, point


def test_the_order_by_bounds_is_that_of_the_clock() -> None:
    """Not whole, but so far that it may choose a row until a clock does."""
    trust = recorded("floor-sm90.json")["trust"]
    assert {kernel: figures["rows"] for kernel, figures in trust.items()} == {"forward": 36, "keys": 49, "queries": 36}
    assert all(figures["in_step"] > 0.75 for figures in trust.values())


def test_ours_and_peers_are_compiled_and_bounded() -> None:
    pytest.importorskip("triton")
    found = list(in_processes(partial(floor.lines, 90, ("queries",)), [32]))
    ours = [line for line in found if line["peer"] == "ours"]
    assert [Tile(**line["tile"]) for line in ours] == list(rows("queries", 90, 32, 2))
    (plain,) = (line for line in found if line["peer"] == "plain")
    for line in (*ours, plain):
        assert 0 < line["in_step"] <= line["bound"] < floor.CHIPS[90].peak


def test_the_plain_peer_computes_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: a peer that left something out would have a bound that is too good."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    from bench import plain_triton as plain

    q, k, v, d_out = torch.randn(4, 2, 64, 16).unbind()
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out, dq, dk, dv = (torch.full_like(q, float("nan"), requires_grad=False) for _ in range(4))
    lse, sizes = torch.empty(2, 64), {"HEAD_DIM": 16, "BLOCK_T": 32, "BLOCK_S": 16}
    given = [tensor.detach() for tensor in (q, k, v)]
    plain.forward_kernel[(2, 2)](*given, out, lse, 64, 0.25 * math.log2(math.e), **sizes)
    stats, scale = torch.stack((lse, (out * d_out).sum(-1))), 0.25 * math.log2(math.e)
    plain.dq_kernel[(2, 2)](*given, d_out, dq, stats, 64, scale, **sizes)
    # Keys are held here: the larger block is theirs.
    sizes |= {"BLOCK_T": 16, "BLOCK_S": 32}
    plain.dk_dv_kernel[(2, 2)](*given, d_out, dk, dv, stats, 64, scale, **sizes)
    for found, wanted in ((out, exact), *zip((dq, dk, dv), torch.autograd.grad(exact, (q, k, v), d_out), strict=True)):
        torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=1e-4)
