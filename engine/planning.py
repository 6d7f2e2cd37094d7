"""The memory of a training step, and the time of a run on many GPUs: arithmetic over shapes, without a tensor.

Memory is derived from what the operators save for the backward pass, not fitted; a test holds it to what a step
allocates. What torch.compile fuses or computes again is not counted: it needs less. The plan of a run adds tokens a
second, what communication takes, hours and cost.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engine import records
from engine.config import ModelConfig, Recipe
from engine.errors import InputError
from kernels.attention.reference import KEPT_LENGTH, ROWS
from kernels.cross_entropy import block_rows

Parts = dict[str, int]
GIB = 2**30
# The bytes of a GPU's memory that CUDA, NCCL and the allocator hold besides the tensors.
RESERVED = 2 * GIB
GB, TERA = 10**9, 10**12
# The share of the data sheet's FLOP/s, where none was measured. Llama 3: 38-43% on H100s (arXiv:2407.21783, table 4).
EFFICIENCY = 0.4
# The share of a link's speed that a collective reaches.
LINK_EFFICIENCY = 0.7


@dataclass(frozen=True)
class Setup:
    """A step as one of `ranks` processes runs it. `tokens` are those of one forward and backward pass on this rank."""

    model: ModelConfig
    optimizer: Literal["muon", "adamw"]
    tokens: int
    element_size: int = 4  # bytes of a number that matrices are multiplied in; parameters are kept in fp32
    gpu: bool = True
    ranks: int = 1
    shard: bool = False  # FSDP2, a block at a time; else every rank has the whole state (DDP)
    accumulate: bool = False  # several passes to a step: gradients stay while the next one runs
    checkpointing: bool = False  # keep only what enters a block, and compute the rest again

    @property
    def row(self) -> int:
        """The bytes of one number for each channel of each token."""
        return self.tokens * self.model.width * self.element_size

    @property
    def wide_row(self) -> int:
        """The same where it is normalised: on a CPU in fp32."""
        return self.row if self.gpu else self.tokens * self.model.width * 4


def matrices(model: ModelConfig) -> list[tuple[int, int, int]]:
    """Return (how many, rows, columns) of the maps in a block, as Muon treats them."""
    width = model.width
    return [(3, width, width), (1, width, width), (1, 4 * width, width), (1, width, 4 * width)]


def elements(setup: Setup) -> tuple[int, int]:
    """Count a rank's parameters: in the blocks' matrices, and all others. FSDP deals out rows, and rank 0 gets most."""
    model, ranks = setup.model, setup.ranks if setup.shard else 1
    stacked = [(3 * model.width, model.width), *((rows, columns) for _, rows, columns in matrices(model)[1:])]
    tables = [(model.vocab_size, model.width), (model.outputs, model.width)]
    vectors = (model.parameters - model.matmul_parameters) // model.width - model.vocab_size
    inside, outside = (sum(-(-rows // ranks) * columns for rows, columns in group) for group in (stacked, tables))
    return model.blocks * inside, outside + vectors * -(-model.width // ranks)


def kept_by_block(setup: Setup) -> int:
    """Return the bytes that a block's forward pass keeps for its backward pass, without torch.compile.

    Per token: the two sums that are normalised, with their statistics (8 bytes each), and what comes out (2 widths);
    the product that queries, keys and values are parts of (3), queries and keys again once they are rotated (2);
    attention's output (1) and log-sum-exps; the MLP's hidden state before and after GELU (8). On a CPU attention keeps
    probabilities in place of log-sum-exps: those of blocks of queries, in sequences taken to fill half a context.
    """
    sums, model = 1 if setup.model.parallel_residual else 2, setup.model
    length = max(1, model.context // 2)
    seen = (length + min(length, ROWS)) // 2 if length <= KEPT_LENGTH else 0
    attention = model.heads * (4 if setup.gpu else seen * setup.element_size)
    return sums * setup.wide_row + 16 * setup.row + setup.tokens * (2 * 8 + attention)


def saved_state(setup: Setup) -> Parts:
    """Return bytes on one rank that stay between steps, and that a checkpoint holds: Muon has one moment, AdamW two."""
    inside, outside = elements(setup)
    optimizer = 8 * outside + (4 if setup.optimizer == "muon" else 8) * inside
    return {"weights": 4 * (inside + outside), "optimizer": optimizer}


def checkpoint_bytes(recipe: Recipe) -> int:
    """Return the size of a run's checkpoints: of its model, of PPO's critic, and of their optimizer's state."""
    models = 2 if recipe.alignment.method == "ppo" else 1
    return models * total(saved_state(Setup(recipe.model, recipe.optimizer.kind, tokens=1)))


def step_memory(setup: Setup) -> dict[str, Parts]:
    """Return bytes on one rank, by part, at the four moments of which one is the peak, in a step after the first."""
    model, size, row = setup.model, setup.element_size, setup.row
    inside, outside = elements(setup)
    gradients = 4 * (inside + outside)
    state = saved_state(setup)
    # DDP's buckets, in which the gradients lie, stay between steps.
    resident = gradients if setup.accumulate or (setup.ranks > 1 and not setup.shard) else 0
    block_weights, embedding = 12 * model.width**2, model.vocab_size * model.width
    head = model.outputs * model.width
    # Autograd keeps a copy of each weight in the dtype of the products, except where FSDP makes these copies.
    copies = block_weights * size if size < 4 and not setup.shard else 0
    # FSDP keeps embedding and head whole to the end of the backward pass; of the blocks, this one and the next.
    tables, ahead = ((embedding + head) * size, 2 * block_weights * size) if setup.shard else (0, 0)

    block = kept_by_block(setup)
    # The last norm's input, its output's gradient; rotary angles; tokens and targets.
    around = setup.wide_row + row + setup.tokens * (8 + 8 * model.rotary_dim + 16)
    once = (2 * model.blocks - 1) * row if setup.checkpointing else model.blocks * block
    again, blocks_copied = (block, 1) if setup.checkpointing else (0, model.blocks)
    # The last MLP holds, beside what was kept, the gradients by its output (1 row) and by its hidden state before and
    # after GELU (8), less what is gone by then (4, and around the last norm 2); and that by a matrix, in both dtypes.
    flowing = 3 * row + 4 * model.width**2 * (4 if size == 4 else 4 + size)

    loss = {
        **state,
        "gradients": resident + 4 * head,
        "weight copies": 0 if setup.checkpointing else copies * model.blocks,
        "activations": once + around + row,
        "logits": _logits(setup),
        "communication": tables,
    }
    begin = {
        **state,
        "gradients": resident + (size if setup.shard else 4) * head,
        "weight copies": copies * blocks_copied,
        "activations": once + again + around + flowing,
        "communication": tables + ahead,
    }
    first_block = {
        **state,
        "gradients": max(resident, gradients - (0 if setup.shard else 4 * embedding)),
        "weight copies": copies,
        "activations": block + around + flowing,
        # A block's gradient, whole, and in fp32 on its way to its owners; that by the head waits for the embedding's.
        "communication": tables + ahead + (block_weights * (size + 4) + size * head if setup.shard else 0),
    }
    tables_last = {
        **state,
        "gradients": gradients + (4 * embedding if setup.accumulate else 0),
        "activations": setup.wide_row + row,
        "communication": tables + (tables // size * (size + 4) if setup.shard else 0),
    }
    step = {**state, "gradients": gradients, "optimizer's work": _orthogonalisation(setup)}
    end = max(first_block, tables_last, key=total)
    return {"loss": loss, "backward begins": begin, "backward ends": end, "optimizer step": step}


def total(parts: Parts) -> int:
    return sum(parts.values())


def peak_memory(setup: Setup) -> int:
    """Return the most bytes that a rank's tensors hold in a step. CUDA's context and gaps between them come on top."""
    return max(map(total, step_memory(setup).values()))


def _logits(setup: Setup) -> int:
    """Return the size of a block of logits, and of what kernels/cross_entropy.py makes of it and of the head."""
    model, size, vocab = setup.model, setup.element_size, setup.model.outputs
    rows = min(setup.tokens, block_rows(setup.tokens, vocab, size, gpu=setup.gpu))
    padded = -(-vocab // 16) * 16
    mixed = size < 4
    # Scores are fp32; their gradient is not, and neither are, on a CPU, the two parts that they are the sum of.
    block = rows * padded * (max(size, 4) + (size * (1 if setup.gpu else 2) if mixed else 0))
    narrow = rows * model.width * size * (1 if setup.gpu else 4)
    copy = vocab * model.width * size if mixed else 0
    return block + narrow + (copy if setup.gpu else 2 * copy) - (copy if setup.shard else 0)


def _orthogonalisation(setup: Setup) -> int:
    """Return what Muon works in, all matrices of one shape at a time: the updates one by one and stacked, in fp32; x,
    its successor, and two products with as many rows and columns as the shorter side, in the products' dtype.

    Sharded, each rank is taken to orthogonalise its share of the matrices, whole.
    """
    if setup.optimizer == "adamw":
        return 0
    ranks = setup.ranks if setup.shard else 1
    return max(
        -(-setup.model.blocks * count // ranks)
        * (2 * 4 * rows * columns + 2 * setup.element_size * (rows * columns + min(rows, columns) ** 2))
        for count, rows, columns in matrices(setup.model)
    )


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
    """Return this machine without a GPU. The speed of a product has to be measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    source = "20 GB/s of memory, 5 GB/s between processes and 10 Gb/s Ethernet assumed"
    return Machine("CPU", memory, 0.0, 0.0, 20 * GB, 5 * GB, 1.25 * GB, source)


@dataclass(frozen=True)
class Rate:
    """The FLOP/s that the model's own products reach in training, and where that number is from."""

    flops: float
    source: str


@dataclass(frozen=True)
class Variant:
    mfu: float


@dataclass(frozen=True)
class Timing:
    """What a plan reads of a file that `gpt bench-train` wrote."""

    device: str
    precision: str
    peak_flops: float
    variants: dict[str, Variant]


def measured_rate(recipe: Recipe, precision: str, device: str, folder: Path) -> Rate | None:
    """Read what `gpt bench-train` wrote down on a device whose name holds `device`; None where it has not run there.

    AdamW's step is taken where there is one, for Muon's work is counted by itself.
    """
    for path in sorted(folder.glob(f"training-{recipe.name}-*.json")):
        result = records.read(path, Timing, "delete it; gpt bench-train writes a new one")
        if device.lower() not in result.device.lower() or result.precision != precision:
            continue
        names = [name for name in ("ours, AdamW", "ours, compiled") if name in result.variants]
        ours = [result.variants[name].mfu for name in names or ("ours",) if name in result.variants]
        if not ours:
            raise InputError(f"{path} has no figure of ours: delete it; gpt bench-train writes a new one")
        share, peak = max(ours), result.peak_flops
        source = f"{share:.0%} of {peak / TERA:,.2f} TFLOP/s, measured on {result.device} ({path.name})"
        return Rate(share * peak, source)
    return None


def assumed_rate(machine: Machine, precision: str) -> Rate:
    peak = machine.single if precision == "fp32" else machine.half
    source = f"{EFFICIENCY:.0%} of {peak / TERA:,.1f} TFLOP/s, ASSUMED (gpt bench-train on such a GPU would measure it)"
    return Rate(EFFICIENCY * peak, source)


def ring_seconds(bytes: float, ranks: int, passes: int, speed: float) -> float:
    """Time a collective around a ring: in each pass a rank sends all but its own share (Patarasuk and Yuan 2009).

    passes: 1 for all-gather and reduce-scatter, 2 for all-reduce, which is both. Without latency.
    """
    return passes * (ranks - 1) / ranks * bytes / speed


def muon_flops(recipe: Recipe, steps: int = 5) -> int:
    """Count one update of all matrices: per step of Newton-Schulz two products with the matrix, one of its square."""
    if recipe.optimizer.kind != "muon":
        return 0
    each = ((count, min(rows, columns), max(rows, columns)) for count, rows, columns in matrices(recipe.model))
    return recipe.model.blocks * steps * sum(count * (4 * s * s * long + 2 * s**3) for count, s, long in each)


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
    """Plan a step of the recipe on `gpus` in all; loop.batch is of all of them together, and a multiple of `gpus`.

    A rank's rows are cut into as few passes as fit in its memory, of at most loop.micro_batch rows.
    """
    model, rows = recipe.model, recipe.loop.batch // gpus
    size, room = 4 if precision == "fp32" else 2, machine.memory - RESERVED
    whole = Setup(model, recipe.optimizer.kind, rows * model.context, size, machine.name != "CPU", gpus, shard)
    most = recipe.loop.micro_batch or rows
    cuts = [cut for cut in range(1, rows + 1) if rows % cut == 0 and rows // cut <= most]
    setups = {cut: replace(whole, tokens=whole.tokens // cut, accumulate=cut > 1) for cut in cuts}
    passes = next((cut for cut, setup in setups.items() if peak_memory(setup) <= room), rows)

    speed = LINK_EFFICIENCY * (machine.link if nodes == 1 else min(machine.link, machine.network * gpus // nodes))
    model_seconds = whole.tokens * model.flops_per_token / rate.flops
    owners = gpus if shard else 1
    # AdamW reads weight, gradient and two moments, and writes all but the gradient: 28 bytes.
    optimizer_seconds = muon_flops(recipe) / owners / rate.flops + 28 * model.parameters / owners / machine.bandwidth
    gradients = 4 * model.parameters
    if shard:
        # Blocks are gathered for the forward and again for the backward pass, the rest once (ZeRO, arXiv:1910.02054).
        gathered = passes * size * (model.parameters + 12 * model.blocks * model.width**2)
        communication, hidden = ring_seconds(gathered + gradients, gpus, 1, speed), model_seconds
    else:
        # The backward pass hides it, where there are several the last one.
        communication, hidden = ring_seconds(gradients, gpus, 2, speed), 2 / 3 * model_seconds / passes
    exposed = max(0.0, communication - hidden)
    fits = peak_memory(setups[passes]) <= room
    return Plan(setups[passes], passes, fits, model_seconds, optimizer_seconds, communication, exposed, speed)
