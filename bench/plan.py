"""A run on many GPUs, on paper: memory, tokens a second, what communication takes, hours and cost."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.config import Recipe
from engine.estimate import GIB, RESERVED, Setup, matrices, peak_memory

GB, TERA = 10**9, 10**12

# Of the data sheet, where nothing was measured. Llama 3 reports 38-43% on H100s (arXiv:2407.21783, table 4).
EFFICIENCY = 0.4
# Of a link's speed that a collective reaches.
LINK_EFFICIENCY = 0.7


@dataclass(frozen=True)
class Machine:
    """A kind of GPU in the node it is usually sold in. Bytes, FLOP/s of dense products, bytes/s in one direction."""

    name: str
    memory: int
    half: float  # bf16 and fp16, added up in fp32
    single: float  # fp32, without TF32
    bandwidth: float
    link: float  # to the others of the node
    network: float  # of each GPU's share, to other nodes
    source: str


MACHINES = {
    "h100": Machine(
        "H100 SXM", 79 * GIB, 989 * TERA, 67 * TERA, 3350 * GB, 450 * GB, 50 * GB,
        "NVIDIA H100 data sheet (SXM): NVLink 900 GB/s both ways; DGX H100: 400 Gb/s InfiniBand for each GPU",
    ),
    "h200": Machine(
        "H200 SXM", 139 * GIB, 989 * TERA, 67 * TERA, 4800 * GB, 450 * GB, 50 * GB,
        "NVIDIA H200 data sheet (SXM): NVLink 900 GB/s both ways; DGX H200: 400 Gb/s InfiniBand for each GPU",
    ),
    "a100": Machine(
        "A100 80GB SXM", 79 * GIB, 312 * TERA, 19.5 * TERA, 2039 * GB, 300 * GB, 25 * GB,
        "NVIDIA A100 data sheet (80GB SXM): NVLink 600 GB/s both ways; DGX A100: 200 Gb/s InfiniBand for each GPU",
    ),
    "4090": Machine(
        "RTX 4090", 23 * GIB, 165 * TERA, 82.6 * TERA, 1008 * GB, 32 * GB, 3 * GB,
        "NVIDIA Ada architecture paper: 165 TFLOP/s with fp32 sums, PCIe 4.0 x16; 25 Gb/s Ethernet per GPU assumed",
    ),
}  # fmt: skip


def this_cpu() -> Machine:
    """This machine without a GPU. A product's speed has to be measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    source = "20 GB/s of memory, 5 GB/s between processes and 10 Gb/s Ethernet assumed"
    return Machine("CPU", memory, 0.0, 0.0, 20 * GB, 5 * GB, 1.25 * GB, source)


@dataclass(frozen=True)
class Rate:
    """FLOP/s that the model's own products reach in training, and where that number is from."""

    flops: float
    source: str


def measured_rate(recipe: Recipe, precision: str, device: str, folder: Path) -> Rate | None:
    """From what `gpt bench-train` wrote down on a device whose name holds `device`; None where it has not run there.

    AdamW's step is taken where there is one, for Muon's work is counted by itself.
    """
    for path in sorted(folder.glob(f"training-{recipe.name}-*.json")):
        result = json.loads(path.read_text())
        if device.lower() not in result["device"].lower() or result["precision"] != precision:
            continue
        ours = {name: found for name, found in result["variants"].items() if name in ("ours, AdamW", "ours, compiled")}
        best = max((ours or {"ours": result["variants"]["ours"]}).values(), key=lambda found: found["mfu"])
        share, peak = best["mfu"], result["peak_flops"]
        source = f"{share:.0%} of {peak / TERA:,.2f} TFLOP/s, measured on {result['device']} ({path.name})"
        return Rate(share * peak, source)
    return None


def assumed_rate(machine: Machine, precision: str) -> Rate:
    peak = machine.single if precision == "fp32" else machine.half
    source = f"{EFFICIENCY:.0%} of {peak / TERA:,.1f} TFLOP/s, ASSUMED (gpt bench-train on such a GPU would measure it)"
    return Rate(EFFICIENCY * peak, source)


def ring_seconds(bytes: float, ranks: int, passes: int, speed: float) -> float:
    """A collective around a ring: in each pass a rank sends all but its own share (Patarasuk and Yuan 2009).

    passes: 1 for all-gather and reduce-scatter, 2 for all-reduce, which is both. Without latency.
    """
    return passes * (ranks - 1) / ranks * bytes / speed


def muon_flops(recipe: Recipe, steps: int = 5) -> int:
    """Of one update of all matrices: per step of Newton-Schulz two products with the matrix, one of its square."""
    if recipe.optimizer.kind != "muon":
        return 0
    each = ((count, min(rows, columns), max(rows, columns)) for count, rows, columns in matrices(recipe.model))
    return recipe.model.blocks * steps * sum(count * (4 * s * s * long + 2 * s**3) for count, s, long in each)


def passes_that_fit(rows: int, most: int, setup: Callable[[int, bool], Setup], memory: int) -> int:
    """Into how many passes of `most` rows a rank's rows are cut so that a step fits: the fewest, or single rows."""
    cuts = [cut for cut in range(1, rows + 1) if rows % cut == 0 and rows // cut <= most]
    fitting = (cut for cut in cuts if peak_memory(setup(rows // cut, cut > 1)) <= memory)
    return next(fitting, rows)


@dataclass(frozen=True)
class Plan:
    setup: Setup
    passes: int
    fits: bool
    model_seconds: float
    optimizer_seconds: float
    communication_seconds: float
    exposed_seconds: float  # of the communication: what the computation does not hide
    link_speed: float

    @property
    def step_seconds(self) -> float:
        return self.model_seconds + self.optimizer_seconds + self.exposed_seconds


def plan(recipe: Recipe, machine: Machine, rate: Rate, precision: str, *, gpus: int, nodes: int, shard: bool) -> Plan:
    """One step of the recipe on `gpus` in all; loop.batch is of all of them together, and a multiple of `gpus`."""
    model, rows = recipe.model, recipe.loop.batch // gpus
    size = 4 if precision == "fp32" else 2

    def setup(rows: int, accumulate: bool) -> Setup:
        return Setup(
            model, recipe.optimizer.kind, rows * model.context, size, machine.name != "CPU", gpus, shard, accumulate
        )

    room = machine.memory - RESERVED
    passes = passes_that_fit(rows, recipe.loop.micro_batch or rows, setup, room)
    chosen = setup(rows // passes, passes > 1)
    speed = LINK_EFFICIENCY * (machine.link if nodes == 1 else min(machine.link, machine.network * gpus // nodes))
    model_seconds = rows * model.context * model.flops_per_token / rate.flops
    owners = gpus if shard else 1
    # AdamW reads weight, gradient and two moments, and writes all but the gradient: 28 bytes.
    optimizer_seconds = muon_flops(recipe) / owners / rate.flops + 28 * model.parameters / owners / machine.bandwidth
    gradients = 4 * model.parameters
    if shard:
        # Blocks are gathered for the forward and again for the backward pass, the rest once (ZeRO, arXiv:1910.02054).
        blocks = 12 * model.blocks * model.width**2
        gathered = passes * size * (model.parameters + blocks)
        communication = ring_seconds(gathered + gradients, gpus, 1, speed)
        hidden = model_seconds
    else:
        communication = ring_seconds(gradients, gpus, 2, speed)
        hidden = 2 / 3 * model_seconds / passes  # the last backward pass
    return Plan(
        chosen,
        passes,
        peak_memory(chosen) <= room,
        model_seconds,
        optimizer_seconds,
        communication,
        max(0.0, communication - hidden),
        speed,
    )
