"""A kernel is compiled once, whatever the lengths, and runs on the GPU of its tensors."""

import json
import subprocess
import sys

import pytest

from tests import gpu_path

pytestmark = pytest.mark.skipif(gpu_path.why_not() is not None, reason=str(gpu_path.why_not()))


def test_no_kernel_is_compiled_anew_for_another_length() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.gpu_path.lengths"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    forward, backward, norm = "attention.forward.", "attention.backward.", "norm_triton."
    once = dict.fromkeys((f"{backward}{name}_kernel" for name in ("delta", "dq", "dk_dv")), 1)
    attention = {f"{forward}forward_kernel": 1, **once}
    # With the keys in one part, or in several.
    decode = {"attention.decode.decode_kernel": 2}
    assert json.loads(done.stdout) == {
        "dense": attention,
        "packed": attention,
        # How many parts are merged is a constant, and a power of two.
        "decode": decode | {"attention.decode.merge_kernel": 8},
        "paged": decode,
        # LayerNorm and RMSNorm each have theirs; what adds up is the same. The activation has one each way.
        "norm": {f"{norm}forward_kernel": 2, f"{norm}backward_kernel": 2, f"{norm}sum_kernel": 1}
        | {"silu_mul_triton.silu_mul_kernel": 2},
        # The loss with its gradient; log-probabilities; and their gradient.
        "loss": {"cross_entropy_triton.rows_kernel": 3},
    }


def test_kernels_graphs_and_copies_are_on_the_gpu_of_their_tensors() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.gpu_path.second_device"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
