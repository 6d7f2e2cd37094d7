#!/usr/bin/env bash
# One would guess that a TorchDispatchMode (a counter of operations, a tracer, a guard against transfers) sees the same
# operations under torch.inference_mode() as under torch.no_grad(): both only turn gradients off.
#
# In truth operations that PyTorch puts together of others arrive whole under inference_mode: F.linear as aten::linear
# and not as aten::mm, x @ y as aten::matmul, and x.item() as aten::item, where aten::_local_scalar_dense is what waits for
# a GPU everywhere else. A mode that looks for mm or _local_scalar_dense by name finds none of them in the code path that
# serves a model, and all of them in the one that trains it.
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat >"$work/show.py" <<'PY'
import sys
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


x, y = torch.ones(3, 3), torch.ones(3, 3)
calls: dict[str, Callable[[], object]] = {
    "F.linear(x, y)": lambda: torch.nn.functional.linear(x, y),
    "x @ y": lambda: x @ y,
    "x.sum().item()": lambda: x.sum().item(),
}
found = []
print("torch", torch.__version__)
for name, call in calls.items():
    row = []
    for context in (torch.no_grad, torch.inference_mode):
        with context(), Noting() as mode:
            call()
        row.append(mode.names)
    found.append(row)
    print(f"{name}: no_grad {row[0]}, inference_mode {row[1]}")
sys.exit(
    found
    != [
        [["aten::t", "aten::mm"], ["aten::linear"]],
        [["aten::mm"], ["aten::matmul"]],
        [["aten::sum", "aten::_local_scalar_dense"], ["aten::sum", "aten::item"]],
    ]
)
PY
"$work/venv/bin/python" "$work/show.py"
