"""The path of every launch, as far as it can be taken without a GPU: what runs is in scenarios.py."""

import json
import os
import subprocess
import sys
from itertools import combinations, product
from typing import Any

import pytest

from tests import gpu_path

pytestmark = pytest.mark.skipif(gpu_path.why_not() is not None, reason=str(gpu_path.why_not()))

FORWARD, DQ, DK_DV = (f"attention.{name}_kernel" for name in ("forward.forward", "backward.dq", "backward.dk_dv"))
DECODE = "attention.decode.decode_kernel"
ALL = {"CAUSAL": False, "WINDOW": True, "SOFTCAP": True, "DESCRIPTOR": False}
# Which kernels may spill, up to how many bytes a thread, and why: architecture, kernel, dtype and constants.
SPILLS: tuple[tuple[int, str, str, dict[str, Any], int, str], ...] = (
    (90, FORWARD, "fp16", ALL | {"BLOCK_D": 32}, 8, "a window on both sides, a cap and no descriptors: two numbers"),
    (90, DK_DV, "fp16", ALL | {"BLOCK_D": 32}, 176, "the same: three loops, two of them with masks and all with tanh"),
    (90, DQ, "fp16", {"HEAD_DIM": 256, "DESCRIPTOR": False}, 136, "tensors that begin beside a multiple of 16"),
    (90, DQ, "fp32", {"HEAD_DIM": 80}, 8, "two numbers, once each, in a row for checks"),
    (90, DECODE, "fp32", {"WINDOW": True, "PAGE": 16}, 8, "a number, once, in rows for checks"),
    (80, FORWARD, "fp16", {"HEAD_DIM": 32, "CAUSAL": False, "SOFTCAP": True}, 24, "a cap without a causal mask"),
    (80, DK_DV, "fp16", ALL | {"BLOCK_D": 64}, 128, "a window on both sides and a cap"),
    (80, DK_DV, "fp16", ALL | {"BLOCK_D": 32}, 16, "a window on both sides and a cap"),
)


def spills(kernel: dict[str, Any], architecture: int) -> bool:
    """Return whether a kernel spills more than the list says that it may."""
    allowed = (
        most
        for where, name, dtype, constants, most, _ in SPILLS
        if where == architecture
        and name == kernel["kernel"]
        and dtype in kernel["pointers"]
        and constants.items() <= kernel["constants"].items()
    )
    return kernel["spilled_bytes"] > max(allowed, default=0)


@pytest.mark.parametrize("architecture", [90, 80])
def test_every_launch_is_right(architecture: int) -> None:
    """All scenarios in one process, and so in one test."""
    command = [sys.executable, "-m", "tests.gpu_path.scenarios", str(architecture)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["wrong"] == {}
    compiled = report["kernels"]
    assert [kernel for kernel in compiled if spills(kernel, architecture)] == []
    # The copy engine is used where it is.
    by_descriptors = {kernel["kernel"] for kernel in compiled if kernel["constants"].get("DESCRIPTOR")}
    assert by_descriptors == ({FORWARD, DQ, DK_DV} if architecture == 90 else set())


def test_any_two_values_of_two_options_meet() -> None:
    from tests.gpu_path.options import ATTENTION, DECODE, covering

    for options in (ATTENTION, DECODE):
        cases = covering(options)
        assert len(cases) < 30
        for one, other in combinations(options, 2):
            met = {(case[one], case[other]) for case in cases}
            assert met == set(product(options[one], options[other])), (one, other)
