#!/usr/bin/env bash
# One would guess that TRITON_INTERPRET=1 runs a kernel on any NumPy that pip puts beside Triton: Triton asks for none in
# particular, and its interpreter is documented as pure NumPy.
#
# In truth Triton 3.6.0 (the one that torch 2.11 asks for) turns every loop bound into a Python number by int() of a NumPy
# array of shape (1,). NumPy 2.4 made an error of that, after warning since 1.25, so that any kernel with a range() in it
# raises "only 0-dimensional arrays can be converted to Python scalars", while one without a loop runs. NumPy 2.3 is
# fine, and so is Triton 3.7.1, which squeezes the array first. Compiled kernels are not touched.
#
# Needs Python 3.11 to 3.13. Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# torch's version does not matter here, Triton's does; without its dependencies the CUDA libraries stay away.
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
for version in 3.6.0 3.7.1; do
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$work/triton-$version" triton==$version
done
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$work/numpy-2.4" numpy==2.4.6

cat >"$work/show.py" <<'PY'
import sys

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def doubled(x_ptr, length, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, 2 * tl.load(x_ptr + offsets))


@triton.jit
def doubled_in_a_loop(x_ptr, length, BLOCK: tl.constexpr):
    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(x_ptr + offsets, 2 * tl.load(x_ptr + offsets))


def outcome(kernel) -> str:
    x = torch.ones(64)
    try:
        kernel[(1,)](x, 64, BLOCK=16)
    except Exception as error:
        return str(error.__cause__ or error)
    return f"sum {x.sum():.0f}"


found = outcome(doubled), outcome(doubled_in_a_loop)
print(f"triton {triton.__version__}, numpy {numpy.__version__}: without a loop {found[0]}; with one {found[1]}")
looped = "only 0-dimensional arrays" in found[1] if sys.argv[1] == "fails" else found[1] == "sum 128"
sys.exit(not (found[0] == "sum 80" and looped))
PY
show() { TRITON_INTERPRET=1 PYTHONPATH="$1" "$work/venv/bin/python" "$work/show.py" "$2" || { echo "the behaviour has changed"; exit 1; }; }
show "$work/triton-3.6.0" works
show "$work/triton-3.6.0:$work/numpy-2.4" fails
show "$work/triton-3.7.1:$work/numpy-2.4" works
