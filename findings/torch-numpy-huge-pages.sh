#!/usr/bin/env bash
# One would guess that 64 MiB from torch.empty and 64 MiB from np.empty are the same kind of memory, so that it does not
# matter which of the two allocates a tensor that the other only borrows (torch.from_numpy copies nothing).
#
# In truth NumPy asks Linux for huge pages for every array of 4 MiB or more (madvise), and PyTorch does not, unless
# THP_MEM_ALLOC_ENABLE=1 is set before it starts. Where /sys/kernel/mm/transparent_hugepage/enabled says "madvise", as
# it does by default on many distributions, weights that are read once per token from NumPy's memory need a fraction of
# the TLB entries: one row times 64 MB of weights read 1.3 to 1.7 times as many GB/s there.
#
# This looks at the flag of the mapping ("hg" in /proc/self/smaps), which depends neither on that setting nor on the CPU.
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat >"$work/show.py" <<'PY'
import re
import sys

import numpy as np
import torch

COUNT = 2**24  # of float32: 64 MiB


def asks_for_huge_pages(address: int) -> bool:
    """Whether most of these 64 MiB lies in mappings with the flag hg."""
    held = 0
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read()):
        first, last = (int(each, 16) for each in block.split(" ", 1)[0].split("-"))
        if re.search(r"VmFlags:.*\bhg\b", block):
            held += max(0, min(last, address + 4 * COUNT) - max(first, address))
    return held > 2 * COUNT


arrays = {
    "np.empty": np.empty(COUNT, np.float32),
    "np.zeros": np.zeros(COUNT, np.float32),
    "torch.empty": torch.empty(COUNT).numpy(),
    "torch.zeros": torch.zeros(COUNT).numpy(),
}
found = {name: asks_for_huge_pages(array.ctypes.data) for name, array in arrays.items()}
print(f"torch {torch.__version__}, numpy {np.__version__}: asks for huge pages: {found}")
sys.exit(found != {"np.empty": True, "np.zeros": True, "torch.empty": False, "torch.zeros": False})
PY
"$work/venv/bin/python" "$work/show.py"
