"""Compile the kernels at every size that they are launched with, without a GPU: registers, spills, shared memory."""

import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from kernels.tiles import Tile

ARCHITECTURES = (80, 89, 90, 100, 120)
# The bytes that one program may take: what a multiprocessor has, less what the system keeps.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
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

# What spills all the same, each a few bytes of what is rare: architecture, kernel, size, and what is special about it.
SPILLS = {
    (90, "keys", 128, "POINTERS"): "heads that do not begin at multiples of 16 bytes: no larger row spills less",
    (90, "forward", 256, "POINTERS"): "the same in fp16, with a window: 80 bytes",
    (90, "queries", 256, "POINTERS"): "the same: 224 bytes",
    (80, "keys", 48, "bf16"): "a head that fills no block: 16 bytes",
    (89, "keys", 48, "bf16"): "the same",
    (100, "keys", 64, "POINTERS"): "heads that do not begin at multiples of 16 bytes",
    (100, "keys", 32, "POINTERS"): "the same, with a window",
    (100, "keys", 32, "bf16"): "8 bytes with a window",
    (100, "forward", 128, "POINTERS"): "the same, with a window",
    (100, "forward", 64, "POINTERS"): "the same, with a window",
    (100, "queries", 32, "POINTERS"): "the same, with a window",
    (100, "forward", 64, "bf16"): "8 bytes with a window",
    (100, "queries", 64, "bf16"): "8 bytes with a window",
    (100, "decode-tall", 96, "bf16"): "8 bytes with a window and a softcap, and a head that fills no block",
    (120, "forward", 256, "POINTERS"): "heads that do not begin at multiples of 16 bytes, with a window",
    (120, "forward", 96, "bf16"): "8 bytes, for a head that fills no block",
    (120, "queries", 32, "bf16"): "16 bytes where window and softcap meet",
    (120, "queries", 64, "bf16"): "the same",
    (120, "decode-tall", 128, "bf16"): "8 bytes",
    **{(120, "delta", size, "bf16"): "8 bytes of 40 registers: no spill, but a stack" for size in (32, 64, 128, 256)},
    (120, "keys", 32, "bf16"): "16 bytes with a softcap; in two loops 24",
    (90, "decode", 192, "fp32"): "a window, a softcap and a paged cache in fp32, which is for checks",
    (90, "decode-tall", 192, "fp32"): "the same",
    (90, "decode", 256, "fp32"): "a window and a paged cache in fp32: 8 bytes",
    (90, "decode", 80, "fp32"): "the same",
    (80, "delta", 32, "fp32"): "8 bytes, once, in fp32, which is for checks",
    (100, "backward", 9000, "fp32"): "RMSNorm so wide in fp32: 8 bytes",
    (90, "backward", 9000, "fp32"): "a norm wider than 8,192 whose rows are no multiple of 16: 8 or 16 warps spill",
}

Constants = dict[str, Any]


class Launch(NamedTuple):
    """One kernel as the compiler wants it: the values of its constants, and how to call it."""

    kernel: str
    function: Any
    dtype: str
    constants: Constants
    about: dict[str, Any]
    warps: int
    stages: int = 3
    types: Mapping[str, str] = TYPE_OF


def attention(
    architecture: int, head_dims: Sequence[int], dtype: str, options: Callable[[str, "Tile", int], Iterator[Constants]]
) -> Iterator[Launch]:
    """Yield the rows of the tile table, each with the constants that `options` gives for a kernel, row and head dim.

    Of `every` option there are so many that only rows which run are looked at.
    """
    from kernels.tiles import rows

    for head_dim, name in itertools.product(head_dims, ATTENTION):
        found = rows(name, architecture, head_dim, ELEMENT_SIZE[dtype])
        if options is every:
            found = found[: 1 + [tile.longest for tile in found].index(None)]
        for tile in found:
            for switches in options(name, tile, head_dim):
                yield attention_launch(name, tile, head_dim, dtype, switches)


def attention_launch(name: str, tile: "Tile", head_dim: int, dtype: str, switches: Constants) -> Launch:
    from kernels.attention.backward import delta_kernel, dk_dv_kernel, dq_kernel
    from kernels.attention.decode import decode_kernel
    from kernels.attention.forward import forward_kernel

    kernels = (forward_kernel, delta_kernel, dk_dv_kernel, dq_kernel, decode_kernel, decode_kernel)
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_T": tile.queries, "BLOCK_S": tile.keys,
        "DESCRIPTOR": tile.descriptors, **switches,
    }  # fmt: skip
    on = [each for each, value in switches.items() if value is True or (each == "PAGE" and value)]
    if tile.descriptors and not constants["DESCRIPTOR"]:
        on.append("POINTERS")
    about = {"head_dim": constants["HEAD_DIM"], "tile": vars(tile), "options": on}
    return Launch(name, kernels[ATTENTION.index(name)], dtype, constants, about, tile.warps, tile.stages)


def usual(kernel: str, tile: "Tile", head_dim: int) -> Iterator[Constants]:
    """Yield causal and packed, as in training; for decode split, with blocks of 16 keys."""
    yield {"CAUSAL": True, "WINDOW": False, "SOFTCAP": False, "PACKED": True, "SPLIT": tile.split, "PAGE": 16}


def every(kernel: str, tile: "Tile", head_dim: int) -> Iterator[Constants]:
    """Yield what a call can ask for: every option, in all combinations where registers are scarce.

    Also a head dim that fills no block, and tensors that suit no descriptor.
    """
    odd = {"HEAD_DIM": head_dim // 4 * 3}
    if kernel == "delta":
        yield from ({"PACKED": False}, {"PACKED": True} | odd)
        return
    usual: Constants = dict.fromkeys(("CAUSAL", "WINDOW", "SOFTCAP", "PACKED"), False)
    masks = [usual | dict(zip(usual, pair, strict=False)) for pair in itertools.product((False, True), repeat=2)]
    if kernel.startswith("decode"):
        sets: list[Constants] = [{"PAGE": page, "SPLIT": bool(page)} for page in (0, 16)]
        sets += [{"SPLIT": True, "PAGE": page, "WINDOW": True, "SOFTCAP": True} | odd for page in (0, 16)]
        yield from (usual | each for each in sets)
        return
    more = ["SOFTCAP", "PACKED"] if kernel == "keys" else []
    sets = [
        *masks,
        *(each | {name: True} for each in masks for name in more),
        dict.fromkeys(usual, True),
        masks[2] | odd,
    ]
    if tile.descriptors:
        sets += [each | {"DESCRIPTOR": False} for each in (masks if kernel == "keys" else masks[3:])]
    yield from (each | {"SPLIT": tile.split} for each in sets)


SILU_MUL: dict[str, Constants] = {"forward": {"BACKWARD": False, "dy_ptr": None}, "backward": {"BACKWARD": True}}


def norms(architecture: int, widths: Sequence[int], dtype: str, *, centred: bool = True) -> Iterator[Launch]:
    """Yield LayerNorm's launches, without and with a bias, or RMSNorm's, which has none; all with a residual."""
    from kernels import norm_triton as kernels

    for width, bias in itertools.product(widths, (False, True) if centred else (False,)):
        about = {"width": width} | ({"bias": bias} if centred else {})
        for name, function, kind, options in (
            ("forward", kernels.forward_kernel, dtype, kernels.forward_options(width)),
            ("backward", kernels.backward_kernel, dtype, kernels.backward_options(width)),
            ("sum", kernels.sum_kernel, "fp32", kernels.sum_options(2 * width if bias else width)),
        ):
            constants = {**options, "BIAS": bias, "RESIDUAL": True, "D_SUM": True, "CENTRED": centred}
            yield Launch(name, function, kind, constants, about, options["num_warps"])


def silu_mul(architecture: int, widths: Sequence[int], dtype: str) -> Iterator[Launch]:
    from kernels.silu_mul_triton import options, silu_mul_kernel

    for width, (name, switches) in itertools.product(widths, SILU_MUL.items()):
        chosen = options(width)
        yield Launch(name, silu_mul_kernel, dtype, chosen | switches, {"width": width}, chosen["num_warps"])


def cross_entropy(architecture: int, vocabs: Sequence[int], dtype: str) -> Iterator[Launch]:
    """Yield loss and gradient in one, and log-probabilities with an entropy, forward and backward; with softcap too."""
    from kernels.cross_entropy_triton import rows_kernel, tile

    passes = {"loss": (True, True, False), "log_probs": (True, False, True), "log_probs backward": (False, True, True)}
    for vocab in vocabs:
        size, warps = tile(vocab)
        for (name, (statistics, gradient, entropy)), softcap in itertools.product(passes.items(), (False, True)):
            constants = {
                "STATISTICS": statistics, "GRADIENT": gradient, "ENTROPY": entropy, "SOFTCAP": softcap, "BLOCK_V": size,
            }  # fmt: skip
            yield Launch(name, rows_kernel, dtype, constants, {"vocab": vocab, "softcap": softcap}, warps)


# Each family has a function to its launches for an architecture, sizes and a dtype, and the sizes that are looked at.
FAMILIES: dict[str, tuple[Callable[[int, Sequence[int], str], Iterator[Launch]], tuple[int, ...]]] = {
    "attention": (partial(attention, options=usual), (32, 64, 128, 256)),
    "cross_entropy": (cross_entropy, (4096, 28000, 128256)),
    "layernorm": (norms, (256, 768, 1024, 2048, 4096, 8192, 9000, 16384)),
    # Heads of Qwen3; the widths of SmolLM2 (135M, 360M, 1.7B), Llama 3.2 1B and 8B, and the widest.
    "rms_norm": (partial(norms, centred=False), (64, 128, 576, 960, 1024, 2048, 4096, 9000, 16384)),
    # Their hidden widths, and one that no vector fits.
    "silu_mul": (silu_mul, (1536, 2560, 8192, 14336, 1001)),
}
# Some 1,000 kernels, in minutes: only where they are asked for.
OPTIONS = {"attention options": (partial(attention, options=every), (32, 64, 128, 256))}


def report(
    family: str, architectures: Sequence[int] = ARCHITECTURES, sizes: Sequence[int] = (), dtype: str = "bf16"
) -> Iterator[dict[str, Any]]:
    """Yield what the compiler says of each kernel of a family. Raises BrokenProcessPool where it ends its process."""
    compiled = partial(compile_family, family, sizes or (FAMILIES | OPTIONS)[family][1], dtype)
    # A process for each architecture: an assertion inside the compiler ends it.
    yield from in_processes(compiled, architectures)


def in_processes(compiled: Callable[[Any], list[dict[str, Any]]], tasks: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield what a function lists for each task, which has a process to itself."""
    # Not at the top: a process that compiles imports this module before it may import the kernels.
    from bench.harness import ending_together

    spawn = multiprocessing.get_context("spawn")
    with (
        ending_together(),
        ProcessPoolExecutor(min(max(1, len(tasks)), os.cpu_count() or 1), spawn, initializer=_compiled) as pool,
    ):
        for lines in pool.map(compiled, tasks):
            yield from lines


def _compiled() -> None:
    # Interpreted kernels cannot be compiled: this comes before the kernels are imported.
    os.environ.pop("TRITON_INTERPRET", None)


def compile_family(family: str, sizes: Sequence[int], dtype: str, architecture: int) -> list[dict[str, Any]]:
    launches = (FAMILIES | OPTIONS)[family][0](architecture, sizes, dtype)
    return [{"dtype": dtype, **compile_launch(launch, architecture)} for launch in launches]


def known_spill(line: dict[str, Any]) -> str | None:
    """Return why a kernel spills, if it does and that is known."""
    special = "POINTERS" if "POINTERS" in line.get("options", ()) else line["dtype"]
    size = next(line[name] for name in ("head_dim", "width", "vocab") if name in line)
    return SPILLS.get((line["architecture"], line["kernel"], size, special))


def compile_launch(launch: Launch, architecture: int) -> dict[str, Any]:
    compiled = compile_kernel(launch, architecture)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": launch.kernel,
        "architecture": architecture,
        **launch.about,
        "warps": compiled.metadata.num_warps,
        **resources(compiled),
        "shared_limit": SHARED_LIMIT[architecture],
        "wgmma": "wgmma" in ptx or "tcgen05.mma" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        "async_copy": "cp.async" in ptx,
    }


def compile_kernel(launch: Launch, architecture: int) -> Any:
    """Return what Triton makes of a kernel, whole: its code, and `metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(launch.function.arg_names):
        if name in launch.constants:
            signature[name], values[(index,)] = "constexpr", launch.constants[name]
            continue
        pointer = name.endswith("_ptr")
        signature[name] = launch.types.get(name, f"*{launch.dtype}" if pointer else "i32")
        parameter = launch.function.params[index]
        known = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        counts = name in ("columns", "n_cols") or name.startswith("stride") or name.endswith("stride")
        if known and (signature[name][0] == "*" or counts):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.function, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    usage = disassembled(compiled, "cuobjdump", "-res-usage")
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return {"registers": int(registers), "spilled_bytes": int(stack), "shared_bytes": compiled.metadata.shared}


def disassembled(compiled: Any, tool: str, option: str) -> str:
    """Return what one of the programs that come with Triton says of a compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [getattr(triton.knobs.nvidia, tool).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
