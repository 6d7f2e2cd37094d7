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
DELTA = "attention.backward.delta_kernel"
DECODE = "attention.decode.decode_kernel"
# Which kernels may spill, up to how many bytes a thread, and why: architecture, kernel, dtype and constants.
ODD = {"HEAD_DIM": 256, "DESCRIPTOR": False}
SPILLS: tuple[tuple[int, str, str, dict[str, Any], int, str], ...] = (
    (90, FORWARD, "fp16", ODD, 80, "heads that do not begin at multiples of 16 bytes, in the widest of tiles"),
    (90, DQ, "fp16", ODD, 224, "the same"),
    (80, DELTA, "fp32", {"HEAD_DIM": 32}, 8, "a number, once, in fp32, which is for checks"),
    (90, DECODE, "fp32", {"WINDOW": True, "PAGE": 16}, 8, "a number, once, in rows for checks"),
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
