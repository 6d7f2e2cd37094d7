"""The path of every launch, as far as it can be taken without a GPU: what runs is in scenarios.py."""

import json
import os
import subprocess
import sys
from itertools import combinations, product
from typing import Any

import pytest

from bench.compile_report import known_spill
from tests import gpu_path

pytestmark = pytest.mark.skipif(gpu_path.why_not() is not None, reason=str(gpu_path.why_not()))

FORWARD, DQ, DK_DV = (f"attention.{name}_kernel" for name in ("forward.forward", "backward.dq", "backward.dk_dv"))
# As the tile table and the list of what may spill call them.
NAMES = {
    FORWARD: "forward", DQ: "queries", DK_DV: "keys", "attention.backward.delta_kernel": "delta",
    "attention.decode.decode_kernel": "decode",
}  # fmt: skip


def unknown_spill(kernel: dict[str, Any], architecture: int) -> bool:
    """Return whether a kernel spills although bench/compile_report.py does not say that it may."""
    constants, name = kernel["constants"], kernel["kernel"]
    if not kernel["spilled_bytes"] or name not in NAMES:
        return bool(kernel["spilled_bytes"])
    dtype = next(each for each in ("bf16", "fp16", "fp32") if each in kernel["pointers"])
    pointers = architecture >= 90 and dtype != "fp32" and constants.get("DESCRIPTOR") is False
    about = {"options": ["POINTERS"] if pointers else [], "dtype": dtype, "head_dim": constants["HEAD_DIM"]}
    return known_spill({"architecture": architecture, "kernel": NAMES[name], **about}) is None


@pytest.mark.parametrize("architecture", [90, 80])
def test_every_launch_is_right(architecture: int) -> None:
    """All scenarios in one process, and so in one test."""
    command = [sys.executable, "-m", "tests.gpu_path.scenarios", str(architecture)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["wrong"] == {}
    compiled = report["kernels"]
    assert [kernel for kernel in compiled if unknown_spill(kernel, architecture)] == []
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
