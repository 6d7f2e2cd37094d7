#!/usr/bin/env bash
# One would guess that the gradients of a LayerNorm's weight and bias are added up in fp32 and rounded to bf16 once, as
# those of a matrix product are, and as the gradient of an addition's broadcast operand is.
#
# In truth PyTorch's CPU kernel adds rows up in bf16, one accumulator for each thread. Where every row pulls in the same
# direction, the sum stands still as soon as a row is smaller than half its last place: the bias gradient of any number
# of rows of ones is 256 on one thread, and 512 on two. In fp32 it is the number of rows. Gradients of mixed signs show a
# few percent at 4,096 rows, so that a test on random numbers passes with a loose tolerance.
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat >"$work/show.py" <<'PY'
import sys

import torch
import torch.nn.functional as F


def bias_gradient(rows: int, dtype: torch.dtype, threads: int) -> float:
    """The gradient of a LayerNorm's bias, where the gradient of every output is 1."""
    torch.set_num_threads(threads)
    x = torch.randn(rows, 64).to(dtype)
    weight, bias = torch.ones(64, dtype=dtype), torch.zeros(64, dtype=dtype, requires_grad=True)
    F.layer_norm(x, (64,), weight, bias).backward(torch.ones(rows, 64, dtype=dtype))
    return bias.grad[0].item()


def added(rows: int) -> float:
    """The same gradient, of a bias that is simply added."""
    bias = torch.zeros(64, dtype=torch.bfloat16, requires_grad=True)
    (torch.randn(rows, 64).bfloat16() + bias).backward(torch.ones(rows, 64, dtype=torch.bfloat16))
    return bias.grad[0].item()


found = {
    "bf16, 4,096 rows, one thread": bias_gradient(4096, torch.bfloat16, 1),
    "bf16, 65,536 rows, one thread": bias_gradient(65536, torch.bfloat16, 1),
    "bf16, 4,096 rows, two threads": bias_gradient(4096, torch.bfloat16, 2),
    "fp32, 4,096 rows, one thread": bias_gradient(4096, torch.float32, 1),
    "bf16, 4,096 rows, a bias that is added": added(4096),
}
print("torch", torch.__version__)
for name, gradient in found.items():
    print(f"{name}: {gradient:.0f}")
sys.exit(list(found.values()) != [256.0, 256.0, 512.0, 4096.0, 4096.0])
PY
"$work/venv/bin/python" "$work/show.py"
