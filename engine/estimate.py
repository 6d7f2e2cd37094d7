"""What a training step holds in memory, by part: arithmetic over shapes, without a tensor.

Derived from what the operators save for the backward pass, not fitted; a test holds it to what a step allocates. What
torch.compile fuses or computes again is not counted: it needs less.
"""

from dataclasses import dataclass
from typing import Literal

from engine.config import ModelConfig
from kernels.cross_entropy import block_rows

Parts = dict[str, int]
GIB = 2**30
# Of a GPU's memory, held by CUDA, by NCCL, and by the allocator beyond what tensors take.
RESERVED = 2 * GIB


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
        """Bytes of one number for each channel of each token."""
        return self.tokens * self.model.width * self.element_size

    @property
    def wide_row(self) -> int:
        """The same where it is normalised: on a CPU in fp32."""
        return self.row if self.gpu else self.tokens * self.model.width * 4


def matrices(model: ModelConfig) -> list[tuple[int, int, int]]:
    """(how many, rows, columns) of the maps in a block, as Muon treats them."""
    width = model.width
    return [(3, width, width), (1, width, width), (1, 4 * width, width), (1, width, 4 * width)]


def elements(setup: Setup) -> tuple[int, int]:
    """Parameters that a rank keeps: in the blocks' matrices, and all others. FSDP deals out rows: rank 0 has most."""
    model, ranks = setup.model, setup.ranks if setup.shard else 1
    stacked = [(3 * model.width, model.width), *((rows, columns) for _, rows, columns in matrices(model)[1:])]
    tables = [(model.vocab_size, model.width), (model.outputs, model.width)]
    vectors = (model.parameters - model.matmul_parameters) // model.width - model.vocab_size
    inside, outside = (sum(-(-rows // ranks) * columns for rows, columns in group) for group in (stacked, tables))
    return model.blocks * inside, outside + vectors * -(-model.width // ranks)


def kept_by_block(setup: Setup) -> int:
    """Bytes that a block's forward pass keeps for its backward pass, without torch.compile.

    Per token: the two sums that are normalised, with their statistics (8 bytes each), and what comes out (2 widths);
    the product that queries, keys and values are parts of (3), queries and keys again once they are rotated (2);
    attention's output (1) and log-sum-exps; the MLP's hidden state before and after GELU (8). On a CPU packed sequences
    are attended to one by one and then joined, so that attention's output is there twice.
    """
    sums = 1 if setup.model.parallel_residual else 2
    rows = 16 if setup.gpu else 17
    return sums * setup.wide_row + rows * setup.row + setup.tokens * (2 * 8 + 4 * setup.model.heads)


def step_memory(setup: Setup) -> dict[str, Parts]:
    """Bytes on one rank, by part, at the four moments of which one is the peak. A step after the first is meant."""
    model, size, row = setup.model, setup.element_size, setup.row
    inside, outside = elements(setup)
    gradients = 4 * (inside + outside)
    state = {"weights": gradients, "optimizer": 8 * outside + (4 if setup.optimizer == "muon" else 8) * inside}
    # DDP's buckets, in which the gradients lie, stay between steps.
    resident = gradients if setup.accumulate or (setup.ranks > 1 and not setup.shard) else 0
    block_weights, embedding = 12 * model.width**2, model.vocab_size * model.width
    head = model.outputs * model.width
    # In the dtype of the products: autograd keeps each weight's copy, but where it is FSDP that makes them.
    copies = block_weights * size if size < 4 and not setup.shard else 0
    # FSDP keeps embedding and head whole to the end of the backward pass; of the blocks, this one and the next.
    tables, ahead = ((embedding + head) * size, 2 * block_weights * size) if setup.shard else (0, 0)

    block = kept_by_block(setup)
    # The last norm's input, its output's gradient; rotary angles; tokens and targets.
    around = setup.wide_row + row + setup.tokens * (8 + 8 * model.rotary_dim + 16)
    once = (2 * model.blocks - 1) * row if setup.checkpointing else model.blocks * block
    again, blocks_copied = (block, 1) if setup.checkpointing else (0, model.blocks)
    # In the last MLP, beside what was kept: gradients by its output (1 row) and by its hidden state before and after
    # GELU (8), less what is gone by then (4, and around the last norm 2); and by a matrix, in both dtypes.
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
    """Bytes of tensors that a step holds on one rank, at most. CUDA's context and the allocator's gaps come on top."""
    return max(map(total, step_memory(setup).values()))


def _logits(setup: Setup) -> int:
    """A block of logits, and what is made of it and of the head (kernels/cross_entropy.py)."""
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
    """Of Muon, which takes all matrices of one shape at a time: the updates one by one and stacked, in fp32; x, its
    successor, and two products with as many rows and columns as the shorter side, in the products' dtype.

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
