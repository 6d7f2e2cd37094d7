"""No kernel spills or overflows at a size that it is launched with, on an architecture that it is meant for."""

import pytest

pytest.importorskip("triton")


def test_no_attention_kernel_spills_or_overflows() -> None:
    from bench.compile_report import ATTENTION, report
    from kernels.tiles import rows

    architectures, head_dims = (80, 89, 90), (32, 64, 128)
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
        # wgmma multiplies 64 rows at a time: the 16 of decode are left to the older units.
        assert line["wgmma"] == (line["architecture"] == 90 and line["kernel"] not in ("delta", "decode")), line
        assert line["tma"] == line["tile"]["descriptors"], line


def test_no_layernorm_kernel_spills_or_overflows() -> None:
    from bench.compile_report import report

    lines = list(report("layernorm", (80, 90), (1024, 4096, 16384)))
    assert len(lines) == 2 * 3 * 2 * 3
    for line in lines:
        assert line["spilled_bytes"] == 0, line
        assert line["shared_bytes"] <= line["shared_limit"], line
        # Rows are fetched ahead while others are worked on, except where a row is split.
        ahead = line["kernel"] == "sum" or (line["kernel"] == "backward" and line["width"] < 16384)
        assert line["async_copy"] == ahead, line


def test_no_cross_entropy_kernel_spills_or_overflows() -> None:
    from bench.compile_report import report

    lines = list(report("cross_entropy", (80, 89, 90)))
    assert len(lines) == 3 * 3 * 3
    for line in lines:
        assert line["spilled_bytes"] == 0, line
        assert line["shared_bytes"] <= line["shared_limit"], line
