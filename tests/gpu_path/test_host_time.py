"""What a call costs the host, by a measure that no other work on the machine can move: the functions that it enters."""

import json
import os
import subprocess
import sys

import pytest

from tests import gpu_path


@pytest.mark.skipif(gpu_path.why_not() is not None, reason=str(gpu_path.why_not()))
def test_no_launch_takes_the_long_way() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "tests.gpu_path.host_time", "--count"]
    done = subprocess.run(
        words, env=environment | {"GPT_KERNELS": "triton", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    entered = json.loads(done.stdout)
    # Through PyTorch's dispatcher, with Triton's look at each argument, they were 288, 837, 105 and 270; a step that
    # looked at each text more than once, 885. A training step has 11,900 with GPT-NeoX's block and Muon, 18,300 with
    # norms of queries and keys, a gated MLP and NorMuon.
    most = {
        "attention forward": 150, "attention forward and backward": 420, "layer norm forward": 90,
        "layer norm forward and backward": 230, "training step": 19_000, "step of 64 texts on a CPU": 450,
    }  # fmt: skip
    assert {name: count for name, count in entered.items() if count > most.get(name, count)} == {}, entered
