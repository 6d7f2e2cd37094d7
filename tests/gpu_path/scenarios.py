"""What runs on a GPU that is not there, and what was wrong with it, as JSON: `python -m tests.gpu_path.scenarios 90`.

A scenario makes some launches, and returns how many of which kernel it should have made. An architecture has a process
of its own, since Triton is either interpreted in a process or it is not.
"""

import json
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.compile_report import resources
from tests import gpu_path
from tests.gpu_path.driver import PROBE, Machine


def begin(gpu: Machine) -> None:
    torch.manual_seed(0)
    torch.cuda.set_device(0)
    gpu.tensors_on = 0
    gpu.launches.clear()
    gpu.problems.clear()


def run(gpu: Machine, scenario: Callable[[], dict[str, int]]) -> list[str]:
    """Return what was wrong with a scenario."""
    begin(gpu)
    try:
        expected = scenario()
    except Exception:
        return [*gpu.problems, traceback.format_exc()]
    launched = dict(Counter(launch.kernel for launch in gpu.launches if launch.kernel != PROBE))
    different = f"launched {launched}; expected {expected}"
    return [*gpu.problems, *([different] if launched != expected else [])]


def find(gpu: Machine, wrong: Callable[[], object], expected: str) -> list[str]:
    """Return what was wrong with how the GPU took a launch that is wrong: nothing where it has said so."""
    begin(gpu)
    try:
        wrong()
    except Exception:
        traceback.print_exc()
    if gpu.problems and all(re.search(expected, problem) for problem in gpu.problems):
        return []
    return [f"found {[*gpu.problems]}; expected {expected!r} alone"]


def kernels(gpu: Machine) -> list[dict[str, Any]]:
    """Return each compiled kernel, with its constants, the types of its parameters, and what it takes."""
    found = []
    for name, hashes in gpu.compiled.items():
        for each in dict.fromkeys(hashes):
            source = gpu.kernels[each].src
            constants = {source.fn.arg_names[place]: value for (place,), value in source.constants.items()}
            types = sorted({kind[1:] for kind in source.signature.values() if kind.startswith("*")})
            found.append({"kernel": name, "constants": constants, "pointers": types, **resources(gpu.kernels[each])})
    return found


def main(architecture: int, chosen: str = "") -> None:
    gpu = gpu_path.install(architecture)
    torch.set_num_threads(1)  # what is computed here is small
    from tests.gpu_path import faults, options, passes

    scenarios: list[tuple[str, Callable[[], list[str]]]] = [
        *((name, partial(run, gpu, call)) for name, call in (*options.calls(gpu), *passes.calls(gpu))),
        *((name, partial(find, gpu, *fault)) for name, fault in faults.FAULTS.items()),
    ]
    wrong, seconds = {}, {}
    for name, scenario in scenarios:
        # An older architecture needs no memory for descriptors.
        if chosen not in name or (name == "fault: no allocator" and architecture < 90):
            continue
        started = time.perf_counter()
        if found := scenario():
            wrong[name] = found
        seconds[name] = round(time.perf_counter() - started, 2)
    print(json.dumps({"wrong": wrong, "seconds": seconds, "kernels": kernels(gpu)}, default=str))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
