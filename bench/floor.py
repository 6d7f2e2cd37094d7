"""A floor on paper: how fast a kernel's inner loop could run on a chip, by the instructions that the compiler made.

Each unit of a multiprocessor needs so many clocks for a round of the loop, at the rates that NVIDIA publishes. The unit
that needs most is the limit, however well warps hide one another's waits: no clock can show more than this bound. What
it leaves out (waits, the first and last tiles, masks, descriptors, memory) only makes a kernel slower.
"""

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.compile_report import SHARED_LIMIT, Launch, compile_kernel, disassembled, in_processes, resources
from kernels.tiles import HEAD_DIMS, Tile


@dataclass(frozen=True)
class Chip:
    """What one multiprocessor does in a clock.

    tensor: bf16 FLOPs with fp32 sums, dense; with `multiprocessors` and `clock` (Hz) the peak of NVIDIA's white papers.
    fp32: results, from the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide.
    """

    name: str
    multiprocessors: int
    clock: float
    tensor: int
    fp32: int
    memory: float  # bytes a second

    @property
    def peak(self) -> float:
        return self.multiprocessors * self.clock * self.tensor


# White papers and data sheets: A100 (40 GB) 312 TFLOP/s; GeForce RTX 4090 165; H100 SXM, whose multiprocessors the H200
# has, 989; B200 2,250; GeForce RTX 5090 210.
CHIPS = {
    80: Chip("A100", 108, 1.410e9, 2048, 64, 1.555e12),
    89: Chip("RTX 4090", 128, 2.520e9, 512, 128, 1.008e12),
    90: Chip("H200", 132, 1.830e9, 4096, 128, 4.8e12),
    100: Chip("B200", 148, 1.850e9, 8192, 128, 8e12),
    120: Chip("RTX 5090", 170, 2.407e9, 512, 128, 1.792e12),
}
# The same guide, results in a clock, alike on all of these: exp2 and its like 16; integers, comparisons, minima and
# conversions 64, integer products too, which share a unit with fp32; shuffles 32. Shared memory moves 128 bytes, and
# four schedulers issue an instruction each, of a warp's 32 threads.
EXPONENTIALS, INTEGERS, SHARED_BYTES, ISSUES = 16, 64, 128, 4
WARP = 32
# Matrix products of a tile, each of 2 x queries x keys x head dim FLOPs.
PRODUCTS = {"forward": 2, "keys": 4, "queries": 3}
PREDICTIONS = ("bound", "in_step")
# What costs a scheduler's slot alone, as all of the scalar unit (U...) does.
ELSEWHERE = re.compile("U|HMMA|BRA|BAR|NOP|EXIT|ELECT|SYNCS|WARPGROUP|DEPBAR|LDGDEPBAR|LDG|STG|LDC|LDTM|STTM")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);")
LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)
JUMP = re.compile(r"BRA(?:\.U)?.*`\((\.L_x_\d+)\)")
WIDTH = re.compile(r"\.(64|128)\b")


def loops(sass: str, holding: str = "MMA") -> list[list[tuple[str, str]]]:
    """Return the innermost loops with matrix products, shortest first, each as its instructions: name and operands.

    The shortest is the one without a mask. Few of the instructions that only one thread runs are counted for all.
    Other loops are found by another part of an instruction's name; where there are none, the whole kernel is returned.
    """
    starts: dict[str, int] = {}
    body: list[tuple[str, str]] = []
    found: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            starts[label[1]] = len(body)
        elif instruction := INSTRUCTION.search(line):
            body.append((instruction[1], instruction[2]))
            target = JUMP.search(line)
            if target and target[1] in starts:
                found.append((starts[target[1]], len(body)))
    inner = [
        body[start:end]
        for start, end in found
        if not any(start <= other and last <= end and (start, end) != (other, last) for other, last in found)
    ]
    found_inner = sorted((loop for loop in inner if any(holding in name for name, _ in loop)), key=len)
    return found_inner if found_inner or holding == "MMA" else [body]


def clocks(loop: Iterable[tuple[str, str]], chip: Chip, warps: int) -> dict[str, float]:
    """Return for how many clocks each unit but the tensor cores works on a round of a loop, for all warps."""
    busy = dict.fromkeys(("issue", "exponentials", "fp32", "integers", "shared memory"), 0.0)
    for name, operands in loop:
        kind = name.split(".")[0]
        busy["issue"] += 1 / ISSUES
        if kind == "MUFU":
            busy["exponentials"] += WARP / EXPONENTIALS
        elif kind in ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"):
            busy["fp32"] += WARP / chip.fp32 * (2 if kind.endswith("2") else 1)
        elif kind == "IMAD":
            busy["fp32"] += WARP / INTEGERS
        elif kind == "HGMMA":
            busy["shared memory"] += _operand_bytes(name, operands) / 4 / SHARED_BYTES  # four warps share the product
        elif kind in ("LDSM", "STSM"):
            matrices = int(name.rsplit(".", 1)[1]) if name[-1] in "24" else 1
            busy["shared memory"] += 128 * matrices / SHARED_BYTES
        elif kind in ("LDS", "STS", "LDGSTS", "LDL", "STL"):
            busy["shared memory"] += WARP * _width(name) / SHARED_BYTES
        elif kind == "SHFL":
            busy["shared memory"] += 1
        elif not ELSEWHERE.match(kind):
            busy["integers"] += WARP / INTEGERS
    return {unit: warps * each for unit, each in busy.items()}


def _operand_bytes(name: str, operands: str) -> int:
    """Return what a product of four warps reads from shared memory: one operand, and the other unless in registers."""
    rows, columns, depth = map(int, re.findall(r"\d+", name)[:3])
    first = operands.split(",")[1].strip()
    return 2 * depth * (columns + (rows if first.startswith("gdesc") else 0))


def bound(sass: str, chip: Chip, kernel: str, head_dim: int, tile: Tile, programs: int) -> dict[str, Any]:
    """Return what the unmasked loop of an attention kernel allows, in FLOP/s of the products that it runs.

    `limit` names the unit that allows no more than `bound`. `in_step` is what is left of it where the warps of a
    program keep in step, and products and the rest overlap only from program to program, of which a multiprocessor
    holds so many at a time: no bound, but nearer to what a clock shows.
    """
    flops = PRODUCTS[kernel] * 2 * tile.queries * tile.keys * head_dim
    busy = clocks(loops(sass)[0], chip, tile.warps)
    if "UTMALDG" in sass:  # the copy engine's two tiles
        walked = tile.queries if kernel == "keys" else tile.keys
        busy["shared memory"] += 2 * 2 * walked * head_dim / SHARED_BYTES
    rest = max(busy.values())
    # The products of Blackwell's tensor cores that are 64 rows high take as long as those of 128.
    rows = tile.keys if kernel == "keys" else tile.queries
    busy["tensor"] = flops / chip.tensor * (2 if "UTCHMMA" in sass and rows < 128 else 1)
    limit, longest = max(busy.items(), key=lambda each: each[1])
    in_step = max(longest, (busy["tensor"] + rest) / programs)
    speed = flops * chip.multiprocessors * chip.clock
    return {
        "clocks": {unit: round(each, 1) for unit, each in busy.items()},
        "limit": limit, "programs": programs, "bound": speed / longest, "in_step": speed / in_step,
    }  # fmt: skip


def stream(sass: str, chip: Chip, warps: int, elements: int) -> dict[str, Any]:
    """Return how many bytes a kernel without products moves for each of `elements`, and how long it works on them.

    `busy` is the time of the unit that works most, over that of the bytes, if they all came from memory.
    """
    body = [instruction for loop in loops(sass, "LDG") for instruction in loop]
    moved = sum(WARP * warps * _width(name) for name, _ in body if name.split(".")[0] in ("LDG", "LDGSTS", "STG"))
    limit, longest = max(clocks(body, chip, warps).items(), key=lambda each: each[1])
    memory = moved / (chip.memory / chip.multiprocessors / chip.clock)
    return {"bytes": moved / elements, "limit": limit, "busy": longest / memory}


def _width(name: str) -> int:
    width = WIDTH.search(name)
    return int(width[1]) // 8 if width else 2 if ".U16" in name else 4


def programs_at_once(architecture: int, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
    """Return how many programs a multiprocessor holds at a time; each also takes 1 KiB of shared memory."""
    room = SHARED_LIMIT[architecture] + 1024
    most = [65536 // (warps * 32 * -(-registers // 8) * 8), room // (shared + 1024)]
    most += [(48 if architecture in (89, 120) else 64) // warps]
    most += [512 // tensor_columns] if tensor_columns else []
    return max(1, min(most))


def floor(architecture: int, results: Path) -> dict[str, Any]:
    """Return the bounds of ours and the peers at each head dim, and how far an order by bounds is to be trusted.

    For that, the rows that were timed on a chip of this architecture (`gpt bench-attention --tune`) are compiled too.
    Raises BrokenProcessPool where the compiler ends a process.
    """
    timed = [path for path in results.glob("attention-tiles-*.json") if CHIPS[architecture].name.lower() in path.name]
    tuned = [each for path in timed for each in json.loads(path.read_text())["tuned"]]
    found = list(in_processes(partial(lines, architecture, tuple(PRODUCTS)), HEAD_DIMS))
    clocked = list(in_processes(partial(_timed, architecture), tuned))
    streams = list(
        in_processes(partial(_streams, architecture), ["layernorm", "rms_norm", "silu_mul", "cross_entropy"])
    )
    trust: dict[str, Any] = {}
    for kernel in PRODUCTS:
        rows = [each for each in clocked if each["kernel"] == kernel and "bound" in each]
        if rows:
            by = {name: rank_correlation([(each["seconds"], -each[name]) for each in rows]) for name in PREDICTIONS}
            trust[kernel] = {"rows": len(rows), **by}
    return {"chip": vars(CHIPS[architecture]), "rows": found, "streams": streams, "trust": trust, "timed": clocked}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Return Spearman's: 1 where both numbers of the pairs have the same order, 0 where they know nothing of it."""
    ranks = (
        [sum(other < each for other in side) + side.count(each) / 2 for each in side]
        for side in zip(*pairs, strict=True)
    )
    return statistics.correlation(*ranks)


def lines(architecture: int, kernels: Sequence[str], head_dim: int) -> list[dict[str, Any]]:
    """Return the bounds of ours and the peers, all causal, dense and in bf16."""
    from bench import compile_report, peers

    def dense(kernel: str, tile: Tile, head_dim: int) -> Iterator[dict[str, Any]]:
        yield {"CAUSAL": True, "WINDOW": False, "SOFTCAP": False, "PACKED": False, "SPLIT": tile.split, "PAGE": 0}

    ours = compile_report.attention(architecture, (head_dim,), "bf16", dense)
    found = [*ours, *peers.plain(architecture, head_dim)]
    missing = []
    try:
        found += peers.flash_linear_attention(architecture, head_dim)
    except ImportError as error:
        missing = [{"peer": "fla", "head_dim": head_dim, "reason": f"not installed ({error})"}]
    return [{"peer": "ours", **_line(each, architecture)} for each in found if each.kernel in kernels] + missing


def _streams(architecture: int, family: str) -> list[dict[str, Any]]:
    """Return what a family beside attention moves, ours beside Liger's, all in bf16 (our logits too, else fp32)."""
    from bench import compile_report, peers

    sizes = {"layernorm": (1024, 4096), "cross_entropy": (28000, 128256), **peers.LLAMA_SIZES}[family]
    ours = compile_report.FAMILIES[family][0](architecture, sizes, "bf16")
    chosen = [each for each in ours if each.about.get("bias", True) and not each.about.get("softcap")]
    found = [("ours", each) for each in chosen if each.kernel in ("forward", "backward", "loss")]
    try:
        found += [("liger", each) for each in peers.liger(architecture, family)]
    except ImportError as error:
        return [{"peer": "liger", "reason": f"not installed ({error})"}]
    result = []
    for peer, launch in found:
        if family == "cross_entropy":  # Liger's logits are bf16, ours fp32: compared is the rest
            launch = launch._replace(types={**launch.types, "logits_ptr": "*bf16"})
        compiled, constants = compile_kernel(launch, architecture), launch.constants
        size = next(constants[name] for name in ("BLOCK_V", "BLOCK_SIZE", "BLOCK_N") if name in constants)
        sass = disassembled(compiled, "nvdisasm", "-c")
        figures = stream(sass, CHIPS[architecture], launch.warps, size * constants.get("ROWS", 1))
        result.append(
            {"peer": peer, "family": family, "kernel": launch.kernel, **launch.about, **resources(compiled), **figures}
        )
    return result


def _timed(architecture: int, tuned: dict[str, Any]) -> list[dict[str, Any]]:
    from bench.compile_report import attention_launch

    found = []
    for timing in tuned["timings"]:
        tile, kernel, head_dim = Tile(**timing["tile"]), tuned["kernel"], tuned["head_dim"]
        switches = {"CAUSAL": True, "WINDOW": False, "SOFTCAP": False, "PACKED": False, "SPLIT": tile.split}
        if "seconds" in timing:
            line = _line(attention_launch(kernel, tile, head_dim, "bf16", switches), architecture)
            line |= {name: timing[name] for name in ("seconds", "flops_per_second")}
            found.append({name: each for name, each in line.items() if name != "clocks"})
    return found


def _line(launch: Launch, architecture: int) -> dict[str, Any]:
    compiled = compile_kernel(launch, architecture)
    found = {"kernel": launch.kernel, **launch.about, **resources(compiled)}
    if found["shared_bytes"] > SHARED_LIMIT[architecture]:
        return found | {"reason": "it wants more shared memory than there is"}
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    programs = programs_at_once(architecture, launch.warps, found["registers"], found["shared_bytes"], columns)
    sass = disassembled(compiled, "nvdisasm", "-c")
    tile = Tile(**launch.about["tile"])
    return found | bound(sass, CHIPS[architecture], launch.kernel, launch.about["head_dim"], tile, programs)
