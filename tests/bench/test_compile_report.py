"""No row of the tile table spills or overflows on an architecture that it is meant for."""

import pytest

pytest.importorskip("triton")


def test_no_attention_kernel_spills_or_overflows() -> None:
    from bench.compile_report import report

    lines = list(report(architectures=(80, 89, 90), head_dims=(32, 64, 128)))
    assert len(lines) == 27
    for line in lines:
        assert line["spilled_bytes"] == 0, line
        assert line["shared_bytes"] <= line["shared_limit"], line
        assert line["wgmma"] == (line["architecture"] >= 90), line
