"""Compile the kernels at every size that they are launched with, without a GPU: registers, spills, shared memory."""

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

ARCHITECTURES = (80, 89, 90, 100)
# The bytes that one program may take: what a multiprocessor has, less what the system keeps.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ELEMENT_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
ATTENTION = ("forward", "delta", "keys", "queries", "decode", "decode-tall")
# The types of arguments by name. All other pointers point to the launch's dtype, and all other numbers are i32. The
# parameters of a norm are fp32, as training keeps them.
TYPES = {
    "*fp32": "lse_ptr d_lse_ptr delta_ptr logits_ptr log_probs_ptr entropy_ptr d_log_probs_ptr d_entropy_ptr "
    "weight_ptr bias_ptr stats_ptr partial_ptr",
    "*i32": "cu_q_ptr cu_k_ptr table_ptr",
    "*i64": "lengths_ptr targets_ptr",
    "fp32": "scale gradient_scale softcap softcap_log2 eps z_loss inverse_temperature",
}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}


class Launch(NamedTuple):
    """One kernel as the compiler wants it: the values of its constants, and how to call it."""

    kernel: str
    function: Any
    dtype: str
    constants: dict[str, Any]
    about: dict[str, Any]
    warps: int
    stages: int = 3


def attention(architecture: int, head_dims: Sequence[int], dtype: str) -> Iterator[Launch]:
    """Yield every row of the tile table: causal and packed, as in training; decode split, with blocks of 16 keys."""
    from kernels.attention.backward import delta_kernel, dk_dv_kernel, dq_kernel
    from kernels.attention.decode import decode_kernel
    from kernels.attention.forward import forward_kernel
    from kernels.tiles import rows

    kernels = (forward_kernel, delta_kernel, dk_dv_kernel, dq_kernel, decode_kernel, decode_kernel)
    functions = dict(zip(ATTENTION, kernels, strict=True))
    for head_dim in head_dims:
        for name, function in functions.items():
            for tile in rows(name, architecture, head_dim, ELEMENT_SIZE[dtype]):
                constants = {
                    "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_T": tile.queries, "BLOCK_S": tile.keys,
                    "CAUSAL": True, "WINDOW": False, "SOFTCAP": False, "PACKED": True,
                    "DESCRIPTOR": tile.descriptors, "SPLIT": tile.split, "PAGE": 16,
                }  # fmt: skip
                about = {"head_dim": head_dim, "tile": vars(tile)}
                yield Launch(name, function, dtype, constants, about, tile.warps, tile.stages)


def layernorm(architecture: int, widths: Sequence[int], dtype: str) -> Iterator[Launch]:
    """Yield launches with a residual, without and with a bias."""
    from kernels import layernorm_triton as kernels

    for width in widths:
        for bias in (False, True):
            about = {"width": width, "bias": bias}
            for name, function, kind, options in (
                ("forward", kernels.forward_kernel, dtype, kernels.forward_options(width)),
                ("backward", kernels.backward_kernel, dtype, kernels.backward_options(width)),
                ("sum", kernels.sum_kernel, "fp32", kernels.sum_options(2 * width if bias else width)),
            ):
                constants = {**options, "BIAS": bias, "RESIDUAL": True, "D_SUM": True}
                yield Launch(name, function, kind, constants, about, options["num_warps"])


def cross_entropy(architecture: int, vocabs: Sequence[int], dtype: str) -> Iterator[Launch]:
    """Yield loss and gradient in one, and log-probabilities with an entropy, forward and backward."""
    from kernels.cross_entropy_triton import rows_kernel, tile

    passes = {"loss": (True, True, False), "log_probs": (True, False, True), "log_probs backward": (False, True, True)}
    for vocab in vocabs:
        size, warps = tile(vocab)
        for name, (statistics, gradient, entropy) in passes.items():
            constants = {
                "STATISTICS": statistics, "GRADIENT": gradient, "ENTROPY": entropy, "SOFTCAP": False, "BLOCK_V": size,
            }  # fmt: skip
            yield Launch(name, rows_kernel, dtype, constants, {"vocab": vocab}, warps)


# Each family has a function to its launches for an architecture, sizes and a dtype, and the sizes that are looked at.
FAMILIES: dict[str, tuple[Callable[[int, Sequence[int], str], Iterator[Launch]], tuple[int, ...]]] = {
    "attention": (attention, (32, 64, 128, 256)),
    "cross_entropy": (cross_entropy, (4096, 28000, 128256)),
    "layernorm": (layernorm, (256, 768, 1024, 2048, 4096, 8192, 16384)),
}


def report(
    family: str, architectures: Sequence[int] = ARCHITECTURES, sizes: Sequence[int] = (), dtype: str = "bf16"
) -> Iterator[dict[str, Any]]:
    """Yield what the compiler says of each kernel of a family. Raises BrokenProcessPool where it ends its process."""
    # Not at the top: a process that compiles imports this module before it may import the kernels.
    from bench.harness import ending_together

    compiled = partial(compile_family, family, sizes or FAMILIES[family][1], dtype)
    # A process for each architecture: an assertion inside the compiler ends it.
    spawn = multiprocessing.get_context("spawn")
    with ending_together(), ProcessPoolExecutor(len(architectures), spawn) as pool:
        for lines in pool.map(compiled, architectures):
            yield from lines


def compile_family(family: str, sizes: Sequence[int], dtype: str, architecture: int) -> list[dict[str, Any]]:
    # Interpreted kernels cannot be compiled: this comes before the kernels are imported.
    os.environ.pop("TRITON_INTERPRET", None)
    launches = FAMILIES[family][0](architecture, sizes, dtype)
    return [{"dtype": dtype, **compile_launch(launch, architecture)} for launch in launches]


def compile_launch(launch: Launch, architecture: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(launch.function.arg_names):
        if name in launch.constants:
            signature[name], values[(index,)] = "constexpr", launch.constants[name]
            continue
        pointer = name.endswith("_ptr")
        signature[name] = TYPE_OF.get(name, f"*{launch.dtype}" if pointer else "i32")
        parameter = launch.function.params[index]
        known = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        if known and (pointer or name == "columns" or name.startswith("stride")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.function, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    ptx = compiled.asm["ptx"]
    return {
        "kernel": launch.kernel,
        "architecture": architecture,
        **launch.about,
        "warps": compiled.metadata.num_warps,
        "registers": int(registers),
        "spilled_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[architecture],
        "wgmma": "wgmma" in ptx or "tcgen05.mma" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        "async_copy": "cp.async" in ptx,
    }
