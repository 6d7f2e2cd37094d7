"""No kernel spills or overflows at a size that it is launched with, on an architecture that it is meant for."""

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


# The two youngest at one head dim: `gpt bench-compile` looks at all.
@pytest.mark.parametrize(("architectures", "head_dims"), [((80, 89, 90), (32, 64, 128)), ((100, 120), (64,))])
def test_no_attention_kernel_spills_or_overflows(architectures: tuple[int, ...], head_dims: tuple[int, ...]) -> None:
    from bench.compile_report import ATTENTION, report
    from kernels.tiles import rows

    lines = list(report("attention", architectures, head_dims))
    assert [(line["kernel"], line["head_dim"], line["architecture"]) for line in lines] == [
        (kernel, head_dim, architecture)
        for architecture in architectures
        for head_dim in head_dims
        for kernel in ATTENTION
        for _ in rows(kernel, architecture, head_dim, 2)
    ]
    for line in lines:
        assert line["spilled_bytes"] == 0, line
        assert line["shared_bytes"] <= line["shared_limit"], line
        # wgmma and its heir multiply 64 rows at a time: the 16 of decode are left to the older units.
        assert line["wgmma"] == (line["architecture"] in (90, 100) and line["kernel"] not in ("delta", "decode")), line
        assert line["tma"] == line["tile"]["descriptors"], line


def test_no_option_spills_beyond_the_list() -> None:
    """The windows of the dk and dv kernel, as it is launched, spilled up to 408 bytes on sm_90."""
    from bench.compile_report import in_processes, known_spill

    lines = list(in_processes(with_window, [("keys", 32), ("keys", 64), ("keys", 128), ("decode", 256)]))
    # Each with descriptors and without, two with a row for short sequences; decode with pages and without.
    assert len(lines) == 3 * 2 + 2 + 2
    for line in lines:
        assert line["spilled_bytes"] == 0 or known_spill(line), line


def with_window(task: tuple[str, int]) -> list[dict[str, Any]]:
    from bench.compile_report import attention, compile_launch, every

    kernel, head_dim = task
    dtype = "fp32" if kernel == "decode" else "bf16"
    found = [each for each in attention(90, [head_dim], dtype, every) if each.kernel == kernel]
    few = [each for each in found if each.constants["WINDOW"] and not each.constants["PACKED"]]
    if kernel == "keys":
        few = [each for each in few if each.constants["CAUSAL"] and not each.constants["SOFTCAP"]]
    return [{"dtype": dtype, **compile_launch(each, 90)} for each in few]


def test_short_sequences_have_rows_of_their_own() -> None:
    """Without descriptors, which a program makes for two to eight tiles; longer ones have them."""
    from kernels import tiles

    for kernel, head_dim in itertools.product(("forward", "keys", "queries"), (32, 64)):
        found = tiles.rows(kernel, 90, head_dim, 2)
        short, *others = (next(tiles.running(found, length)) for length in (512, 513, 1 << 20))
        assert not short.descriptors and all(tile.descriptors for tile in others)
    # A CPU, whose kernels are interpreted, takes sm_80's rows.
    assert tiles.tile("keys", torch.device("cpu"), 64, 2, 256) == tiles.TABLE["keys", "sm_80", 64][0]
    for found in tiles.TABLE.values():
        assert None in [tile.longest for tile in found]


def test_no_norm_and_no_activation_spills_or_overflows() -> None:
    from bench.compile_report import in_processes

    lines = list(in_processes(norms_and_activations, (80, 89, 90, 100)))
    assert len(lines) == 2 * 3 * 2 * 3 + 4 * (3 + 2)
    for line in lines:
        assert line["spilled_bytes"] == 0, line
        assert line["shared_bytes"] <= line["shared_limit"], line
        # Rows are fetched ahead while others are worked on, except where a row is split; the activation has no loop.
        ahead = line["kernel"] == "sum" or (line["kernel"] == "backward" and line["width"] not in (1536, 16384))
        assert line["async_copy"] == ahead, line


def norms_and_activations(architecture: int) -> list[dict[str, Any]]:
    from bench.compile_report import compile_family

    sizes: dict[str, tuple[int, ...]] = {"rms_norm": (960,), "silu_mul": (1536,)}
    if architecture in (80, 90):
        sizes["layernorm"] = (1024, 4096, 16384)
    return [line for family, few in sizes.items() for line in compile_family(family, few, "bf16", architecture)]


def test_no_cross_entropy_kernel_spills_or_overflows() -> None:
    from bench.compile_report import report

    lines = list(report("cross_entropy", (80, 89, 90)))
    assert len(lines) == 3 * 3 * 3 * 2
    for line in lines:
        assert line["spilled_bytes"] == 0, line
        assert line["shared_bytes"] <= line["shared_limit"], line
