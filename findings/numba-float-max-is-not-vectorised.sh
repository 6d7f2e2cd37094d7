#!/usr/bin/env bash
# One would guess that Numba's fastmath=True lets LLVM vectorise the largest of an array of float32 as it does its sum:
# fastmath promises that there is no NaN, and x86 has had a packed maximum since SSE.
#
# In truth the loop stays scalar, whether it is written with `if`, with max(), or as array.max(): Numba compares and
# selects without the flags that LLVM's reduction wants. The sum of the same loop becomes packed additions. The largest of
# the same bits as integers is vectorised (floats of one sign are in the order of their bits), ten times as fast.
#
# This reads the assembly for a fixed x86 CPU, so that it does not depend on where it runs. Exits with 1 where this is no
# longer so; does nothing on other processors.
set -euo pipefail
[ "$(uname -m)" = x86_64 ] || { echo "not an x86 processor: nothing to show"; exit 0; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numba==0.68.1 numpy==2.4.6

cat >"$work/show.py" <<'PY'
import re
import sys

import numba
import numpy as np

SIGNATURE = "(float32[::1],)"


def largest_by_if(x):
    top = x[0]
    for i in range(len(x)):
        if x[i] > top:
            top = x[i]
    return top


def largest_by_max(x):
    top = x[0]
    for i in range(len(x)):
        top = max(top, x[i])
    return top


def largest_of_bits(x):
    bits, top = x.view(np.int32), np.int32(0)
    for i in range(len(bits)):
        top = max(top, bits[i])
    return top


def total(x):
    found = np.float32(0)
    for i in range(len(x)):
        found += x[i]
    return found


def packed(function, instruction: str) -> bool:
    compiled = numba.njit(SIGNATURE, fastmath=True)(function)
    (assembly,) = compiled.inspect_asm().values()
    return re.search(rf"\bv{instruction}\s.*ymm", assembly) is not None


found = {
    "largest, by if": packed(largest_by_if, "maxps") or packed(largest_by_if, "cmp\\w*ps"),
    "largest, by max()": packed(largest_by_max, "maxps") or packed(largest_by_max, "cmp\\w*ps"),
    "largest of the bits": packed(largest_of_bits, "pmaxsd"),
    "sum": packed(total, "addps"),
}
print(f"numba {numba.__version__}, fastmath=True, AVX2: packed instructions: {found}")
sys.exit(found != {"largest, by if": False, "largest, by max()": False, "largest of the bits": True, "sum": True})
PY
NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx,+avx2,+fma,+sse4.2 "$work/venv/bin/python" "$work/show.py"
