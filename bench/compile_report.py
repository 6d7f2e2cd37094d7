"""Compile every attention kernel at every row of the tile table, without a GPU: registers, spills, shared memory.

Runs as a program of its own (`python -m bench.compile_report`), one JSON line per kernel: an assertion inside the
compiler ends the process, and where kernels are interpreted (TRITON_INTERPRET) there is nothing to compile.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kernels.tiles import Tile, rows

ARCHITECTURES = (80, 89, 90, 100)
HEAD_DIMS = (32, 64, 128, 256)
KERNELS = ("forward", "delta", "keys", "queries")
# Of one program, in bytes: what the architecture has per multiprocessor, less what the system keeps.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ELEMENT_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
FP32 = ("lse_ptr", "d_lse_ptr", "delta_ptr")


def report(
    architectures: Sequence[int] = ARCHITECTURES, head_dims: Sequence[int] = HEAD_DIMS, dtype: str = "bf16"
) -> Iterator[dict[str, Any]]:
    """What the compiler says of each kernel, architecture, head dim and row, in a process per architecture."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile_report", dtype, ",".join(map(str, head_dims))]
    root = Path(__file__).resolve().parent.parent
    running = [
        subprocess.Popen([*command, str(each)], cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
        for each in architectures
    ]
    for process in running:
        output, _ = process.communicate()
        yield from map(json.loads, output.splitlines())
        if process.returncode:
            raise RuntimeError(f"the compiler ended with {process.returncode}; what it printed stands above")


def compile_kernel(name: str, architecture: int, head_dim: int, dtype: str, tile: Tile) -> dict[str, Any]:
    """Causal and packed, as training uses it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.attention.backward import delta_kernel, dk_dv_kernel, dq_kernel
    from kernels.attention.forward import forward_kernel

    kernels = {"forward": forward_kernel, "delta": delta_kernel, "keys": dk_dv_kernel, "queries": dq_kernel}
    kernel = kernels[name]
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BLOCK_T": tile.queries,
        "BLOCK_S": tile.keys, "CAUSAL": True, "WINDOW": False, "SOFTCAP": False, "PACKED": True,
        "DESCRIPTOR": tile.descriptors, "SPECIALIZE": tile.specialize,
        "SPLIT": tile.split,
    }  # fmt: skip
    signature, values, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(index,)] = "constexpr", constants[argument]
        elif argument.endswith("_ptr"):
            pointed = "fp32" if argument in FP32 else "i32" if argument.startswith("cu_") else dtype
            signature[argument] = f"*{pointed}"
        else:
            signature[argument] = "fp32" if "scale" in argument or "softcap" in argument else "i32"
        if argument.endswith("_ptr") or (argument.startswith("stride") and "lse" not in argument):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    ptx = compiled.asm["ptx"]
    return {
        "kernel": name,
        "architecture": architecture,
        "head_dim": head_dim,
        "dtype": dtype,
        "tile": vars(tile),
        "registers": int(registers),
        "spilled_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[architecture],
        "warps": compiled.metadata.num_warps,
        "wgmma": "wgmma" in ptx or "tcgen05.mma" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        "async_copy": "cp.async" in ptx,
        "specialized": "setmaxnreg" in ptx,
    }


if __name__ == "__main__":
    element, sizes, target = sys.argv[1:]
    for size in map(int, sizes.split(",")):
        for each in KERNELS:
            for row in rows(each, int(target), size, ELEMENT_SIZE[element]):
                print(json.dumps(compile_kernel(each, int(target), size, element, row)), flush=True)
