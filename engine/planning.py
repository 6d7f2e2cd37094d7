"""The memory of a training step, and the time of a run on many GPUs: arithmetic over shapes, without a tensor.

Memory is derived from what the operators save for the backward pass, not fitted; a test holds it to what a step
allocates. What torch.compile fuses or computes again is not counted: it needs less. The plan of a run adds tokens a
second, what communication takes, hours and cost.
"""

import os
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

from engine import records
from engine.config import LoraConfig, ModelConfig, Recipe
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
    optimizer: Literal["muon", "normuon", "adamw"]
    tokens: int
    element_size: int = 4  # bytes of a number that matrices are multiplied in; parameters are kept in fp32
    gpu: bool = True
    ranks: int = 1
    shard: bool = False  # FSDP2, a block at a time; else every rank has the whole state (DDP)
    accumulate: bool = False  # several passes to a step: gradients stay while the next one runs
    checkpointing: bool = False  # keep only what enters a block, and compute the rest again
    lora: LoraConfig = field(default_factory=LoraConfig)  # with a rank adapters alone learn: see engine/lora.py

    @property
    def row(self) -> int:
        """The bytes of one number for each channel of each token."""
        return self.tokens * self.model.width * self.element_size

    @property
    def wide_row(self) -> int:
        """The same where it is normalised: on a CPU LayerNorm keeps it in fp32."""
        return self.row if self.gpu or self.model.norm == "rms" else self.tokens * self.model.width * 4


def matrices(model: ModelConfig) -> list[tuple[int, int, int]]:
    """Return (how many, rows, columns) of the maps in a block, as Muon treats them."""
    return [(count, rows, columns) for outputs, columns in model.maps().values() for count, rows in _alike(outputs)]


def _alike(outputs: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return how many of the maps that are stacked in one matrix have so many rows."""
    return [(len([*same]), rows) for rows, same in groupby(outputs)]


def elements(setup: Setup) -> tuple[int, int, int]:
    """Count a rank's parameters: in the blocks' matrices, the tables, and the vectors. FSDP deals out rows, and rank 0
    gets most."""
    model, ranks = setup.model, setup.ranks if setup.shard else 1
    stacked = [(sum(outputs), columns) for outputs, columns in model.maps().values()]
    tables = [(rows, model.width) for rows in (model.vocab_size, model.outputs)[: 1 + model.own_head]]
    whole = model.blocks * sum(rows * columns for rows, columns in stacked)
    vectors = model.parameters - whole - sum(rows * columns for rows, columns in tables)
    inside, outside = (sum(-(-rows // ranks) * columns for rows, columns in group) for group in (stacked, tables))
    of_heads = 2 * model.blocks if model.qk_norm else 0
    each, rest = divmod(vectors - of_heads * model.head_dim, model.width)
    shares = each * -(-model.width // ranks) + of_heads * -(-model.head_dim // ranks)
    return model.blocks * inside, outside, shares + rest


def learning(setup: Setup) -> tuple[int, int]:
    """Count a rank's parameters that learn: in the blocks' matrices, and all others."""
    if setup.lora.rank:
        return 0, -(-setup.lora.parameters(setup.model) // (setup.ranks if setup.shard else 1))
    inside, *others = elements(setup)
    return inside, sum(others)


def kept_by_block(setup: Setup, layer: int) -> int:
    """Return the bytes that a block's forward pass keeps for its backward pass, without torch.compile.

    Per token: the two sums that are normalised, with LayerNorm's statistics (8 bytes each); what enters each map that
    learns; the product that queries, keys and values are parts of, queries and keys again once they are rotated; what
    attention keeps; and the MLP's hidden state before its activation. An adapter keeps what is between its matrices.
    """
    model, lora, maps = setup.model, setup.lora, setup.model.maps()
    learns = lora.chosen if lora.rank else tuple(maps)
    inputs = sum(maps[name][1] for name in learns) + lora.rank * len(lora.chosen)
    turned = 0 if model.kind_of(layer) == "n" else (model.heads + model.kv_heads) * model.head_dim
    numbers = inputs + model.qkv_rows + turned + sum(maps["mlp.expand"][0])
    sums, statistics = 1 if model.parallel_residual else 2, 16 if model.norm == "layer" else 8 * setup.gpu
    return sums * setup.wide_row + setup.tokens * (numbers * setup.element_size + statistics + _attention(setup, layer))


def _attention(setup: Setup, layer: int) -> int:
    """Return the bytes that attention keeps of a token besides what enters it.

    That are log-sum-exps, where our kernels run. On a CPU, for sequences taken to fill half a context: fp32 copies of
    what enters it where Numba compiles it, else the probabilities of blocks of queries; or with shared key heads or a
    window what SDPA keeps, its output for each sequence, and a mask; or all scores three times where they are capped.
    """
    model, size, length = setup.model, setup.element_size, max(1, setup.model.context // 2)
    if setup.gpu:
        return 4 * model.heads
    masked = (model.window_of(layer) or length) < length
    if model.score_cap is not None:
        return 3 * model.heads * length * size + (2 * model.attended + model.kv_heads * model.head_dim) * size + length
    if masked or model.kv_heads != model.heads:
        return 4 * model.heads + model.attended * size + (length * size if masked else 0)
    if length <= KEPT_LENGTH and model.head_dim % 16 == 0:
        return 3 * model.attended * (4 - size)
    seen = (length + min(length, ROWS)) // 2 if length <= KEPT_LENGTH else 0
    return model.heads * seen * size


def saved_state(setup: Setup) -> Parts:
    """Return bytes on one rank that stay between steps, and that a checkpoint holds: Muon has one moment, AdamW two.

    Beside adapters matrices are kept in the dtype of the products.
    """
    inside, tables, vectors = elements(setup)
    of_matrices, of_rest = learning(setup)
    optimizer = 8 * of_rest + (8 if setup.optimizer == "adamw" else 4) * of_matrices
    if setup.optimizer == "normuon" and not setup.lora.rank:
        optimizer -= 4 * tables  # one moment, as of matrices; a mean for each row is next to nothing
    if setup.lora.rank:
        return {"weights": setup.element_size * (inside + tables) + 4 * (vectors + of_rest), "optimizer": optimizer}
    return {"weights": 4 * (inside + tables + vectors), "optimizer": optimizer}


def checkpoint_bytes(recipe: Recipe) -> int:
    """Return the size of a run's checkpoints: of its model, of PPO's critic, and of their optimizer's state."""
    models = 2 if recipe.alignment.method == "ppo" else 1
    size = 2 if recipe.precision in ("bf16", "fp16") else 4
    return models * total(saved_state(Setup(recipe.model, recipe.optimizer.kind, 1, size, lora=recipe.lora)))


def step_memory(setup: Setup) -> dict[str, Parts]:
    """Return bytes on one rank, by part, at the four moments of which one is the peak, in a step after the first."""
    model, size, row = setup.model, setup.element_size, setup.row
    gradients, state, frozen = 4 * sum(learning(setup)), saved_state(setup), setup.lora.rank > 0
    # DDP's buckets, in which the gradients lie, stay between steps.
    resident = gradients if setup.accumulate or (setup.ranks > 1 and not setup.shard) else 0
    maps = model.maps()
    block_weights = sum(sum(outputs) * columns for outputs, columns in maps.values())
    embedding, head = model.vocab_size * model.width, model.outputs * model.width
    # Autograd keeps a copy of each weight in the dtype of the products, except where FSDP makes these copies.
    copied = setup.lora.parameters(model) // model.blocks if frozen else block_weights
    copies = copied * size if size < 4 and not setup.shard else 0
    # FSDP keeps embedding and head whole to the end of the backward pass; of the blocks, this one and the next.
    own = head if model.own_head else 0
    tables, ahead = ((embedding + own) * size, 2 * block_weights * size) if setup.shard else (0, 0)
    # What of the gradients is there first, by the head, and last, by the embedding: a tied one's are two for a moment.
    first, last = (0, 0) if frozen else (head, embedding)
    twice = 4 * last if setup.accumulate or not model.own_head else 0

    blocks = [kept_by_block(setup, layer) for layer in range(model.blocks)]
    block = max(blocks)
    # The last norm's input, its output's gradient; rotary angles; tokens and targets.
    around = setup.wide_row + row + setup.tokens * (8 + 8 * model.rotary_dim + 16)
    once = (2 * model.blocks - 1) * row if setup.checkpointing else sum(blocks)
    again, blocks_copied = (block, 1) if setup.checkpointing else (0, model.blocks)
    # The last MLP holds, beside what was kept, the gradients by its output and by its hidden state before and after the
    # activation, less what is gone by then (what came after it, and around the last norm 2 rows); and the gradient by
    # a matrix, in both dtypes.
    outputs, columns = maps["mlp.expand"][0], maps["mlp.contract"][1]
    flowing = setup.tokens * sum(outputs) * size - row
    # On a CPU a gated MLP's product is computed again, in three steps as wide as it.
    flowing += 3 * setup.tokens * columns * size if model.mlp == "gated" and not setup.gpu else 0
    flowing += 0 if frozen else model.width * columns * (4 if size == 4 else 4 + size)

    loss = {
        **state,
        "gradients": resident + 4 * first,
        "weight copies": 0 if setup.checkpointing else copies * model.blocks,
        "activations": once + around + row,
        "logits": _logits(setup),
        "communication": tables,
    }
    begin = {
        **state,
        "gradients": resident + (size if setup.shard else 4) * first,
        "weight copies": copies * blocks_copied,
        "activations": once + again + around + flowing,
        "communication": tables + ahead,
    }
    first_block = {
        **state,
        "gradients": max(resident, gradients - (0 if setup.shard or not model.own_head else 4 * last)),
        "weight copies": copies,
        "activations": block + around + flowing,
        # A block's gradient, whole, and in fp32 on its way to its owners; that by the head waits for the embedding's.
        "communication": tables + ahead + (copied * (size + 4) + size * first if setup.shard else 0),
    }
    tables_last = {
        **state,
        "gradients": gradients + twice,
        "activations": setup.wide_row + row,
        "communication": tables + (tables // size * (size + 4) if setup.shard and not frozen else 0),
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
    copy = vocab * model.width * size if mixed and not setup.lora.rank else 0
    return block + narrow + (copy if setup.gpu else 2 * copy) - (copy if setup.shard else 0)


def _orthogonalisation(setup: Setup) -> int:
    """Return what Muon works in, all matrices of one shape at a time: the updates one by one and stacked, in fp32; x,
    its successor, and two products with as many rows and columns as the shorter side, in the products' dtype.

    Sharded, each rank is taken to orthogonalise its share of the matrices, whole. Of a table, an update and a product.
    """
    if setup.optimizer == "adamw" or setup.lora.rank:
        return 0
    ranks, size = setup.ranks if setup.shard else 1, setup.element_size
    # Of maps of several sizes that are stacked in one matrix, those of one size are worked on at a time.
    table = 2 * 4 * -(-setup.model.vocab_size // ranks) * setup.model.width if setup.optimizer == "normuon" else 0
    return max(
        table,
        *(
            -(-setup.model.blocks * count // ranks)
            * (2 * 4 * (sum(outputs) * columns // count) + 2 * size * (rows * columns + min(rows, columns) ** 2))
            for outputs, columns in setup.model.maps().values()
            for count, rows in _alike(outputs)
        ),
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


def gpu_like(name: str) -> Machine:
    """Return the GPU of this name, as its driver says it; for one that is not known the smallest of the table."""
    return next((machine for key, machine in MACHINES.items() if key in name.lower()), MACHINES["4090"])


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
    model = recipe.model
    if recipe.optimizer.kind == "adamw" or recipe.lora.rank:
        return 0
    each = ((count, min(rows, columns), max(rows, columns)) for count, rows, columns in matrices(model))
    inside = model.blocks * steps * sum(count * (4 * s * s * long + 2 * s**3) for count, s, long in each)
    if recipe.optimizer.kind == "muon":
        return inside
    # Of embedding and head the Gram matrix and what it makes of the update, and its own four products a step.
    tables = (model.vocab_size, model.outputs)[: 1 + model.own_head]
    return inside + sum(4 * rows * model.width**2 + 8 * steps * model.width**3 for rows in tables)


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
    again, learnt = recipe.loop.checkpoint_activations, recipe.lora.parameters(model) or model.parameters
    whole = Setup(model, recipe.optimizer.kind, rows * model.context, size, machine.name != "CPU", gpus, shard)
    whole = replace(whole, checkpointing=again, lora=recipe.lora)
    most = recipe.loop.micro_batch or rows
    cuts = [cut for cut in range(1, rows + 1) if rows % cut == 0 and rows // cut <= most]
    setups = {cut: replace(whole, tokens=whole.tokens // cut, accumulate=cut > 1) for cut in cuts}
    passes = next((cut for cut, setup in setups.items() if peak_memory(setup) <= room), rows)

    speed = LINK_EFFICIENCY * (machine.link if nodes == 1 else min(machine.link, machine.network * gpus // nodes))
    # What is computed again is a forward pass, which takes a third of the FLOPs of a step.
    model_seconds = whole.tokens * (recipe.flops_per_token + again * model.flops_per_token / 3) / rate.flops
    owners = gpus if shard else 1
    # AdamW reads weight, gradient and two moments, and writes all but the gradient: 28 bytes.
    optimizer_seconds = muon_flops(recipe) / owners / rate.flops + 28 * learnt / owners / machine.bandwidth
    gradients = 4 * learnt
    if shard:
        # Blocks are gathered for the forward and again for the backward pass, the rest once (ZeRO, arXiv:1910.02054).
        gathered = (
            passes * size * (model.parameters + sum(each * r * c for each, r, c in matrices(model)) * model.blocks)
        )
        communication, hidden = ring_seconds(gathered + gradients, gpus, 1, speed), model_seconds
    else:
        # The backward pass hides it, where there are several the last one.
        communication, hidden = ring_seconds(gradients, gpus, 2, speed), 2 / 3 * model_seconds / passes
    exposed = max(0.0, communication - hidden)
    fits = peak_memory(setups[passes]) <= room
    return Plan(setups[passes], passes, fits, model_seconds, optimizer_seconds, communication, exposed, speed)
