"""From one number to a recipe: a model's shape, its learning rates and its batch. Arithmetic, without a tensor.

What is tuned is tuned small, on nano, and carried to other sizes by power laws (Yang et al., arXiv:2203.03466). All
exponents stand in the table below, and a test holds it to what bench/sweeps.py has measured: bench/results/laws.json.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from engine.config import PRESETS, ModelConfig, OptimizerConfig


@dataclass(frozen=True)
class Powers:
    """The exponents by which a learning rate follows width, blocks, tokens a step, and tokens of the whole run."""

    width: float = 0.0
    depth: float = 0.0
    batch: float = 0.0
    tokens: float = 0.0


# Muon's step has the same spectral norm at every width, so its rate stays (Bernstein and Newhouse, arXiv:2409.20325).
# A table's rate stays as well, and a head's falls with its inputs (muP). With a batch rates rise by its root (Malladi
# et al., arXiv:2205.10287); with the length of a run they fall (Bjorck et al., arXiv:2409.19913).
RATES = {
    "matrix_rate": Powers(depth=-0.5, batch=0.5, tokens=-0.32),
    "embedding_rate": Powers(batch=0.5, tokens=-0.32),
    "head_rate": Powers(width=-1.0, batch=0.5, tokens=-0.32),
    "norm_rate": Powers(batch=0.5, tokens=-0.32),
}
# Tokens a step grow by this power of the tokens of the run (Zhang et al., arXiv:2410.21676), between two bounds.
BATCH_POWER, LEAST_BATCH, MOST_BATCH = 0.5, 2048, 2**20
# So wide for each block: nano's 32, between tiny's 21 and large's 43; thin and deep is better below a billion (Liu et
# al., arXiv:2402.14905).
ASPECT = 32
MOST_BLOCKS = 100
# The vocabulary grows by this power of the blocks, such that its tables keep to the weights inside blocks as in Tao et
# al., arXiv:2407.13623. Fewer pieces than nano's were worse on little text, too (bench/README.md).
VOCABULARY_POWER, MOST_VOCABULARY = 1.5, 32_768

# What was tuned, and for which length of a run.
TUNED = PRESETS["nano"]
TUNED_TOKENS = TUNED.budget.tokens or 0


def shape(depth: int) -> ModelConfig:
    """Return the model of so many blocks: one family, of which nano is the member with 4."""
    width = ASPECT * depth
    if width > 512:
        width = 64 * math.ceil(width / 64)  # what GPUs multiply without a remainder, and whole heads
    pieces = TUNED.model.vocab_size * max(1.0, depth / TUNED.model.blocks) ** VOCABULARY_POWER
    return replace(
        TUNED.model,
        blocks=depth,
        width=width,
        heads=width // (64 if width >= 512 else 32),
        vocab_size=min(MOST_VOCABULARY, 1024 * round(pieces / 1024)),
        context=512 if width >= 512 else TUNED.model.context,
    )


def shape_of_parameters(parameters: float) -> ModelConfig:
    """Return the member of the family whose parameters are nearest, as a ratio."""
    members = [shape(depth) for depth in range(1, MOST_BLOCKS + 1)]
    return min(members, key=lambda model: abs(math.log(model.parameters / parameters)))


def batch(tokens: float, context: int, multiple: int = 1) -> int:
    """Return the rows of a step for a run of so many tokens: a multiple of the processes that share them."""
    wanted: float = TUNED.tokens_per_step * (tokens / TUNED_TOKENS) ** BATCH_POWER
    rows: float = min(max(wanted, LEAST_BATCH), MOST_BATCH) / context
    # Many rows are cut among GPUs, and into passes.
    each = math.lcm(multiple, 8 if rows >= 32 else 1)
    return max(each, each * round(rows / each))


def optimizer(model: ModelConfig, tokens_per_step: float, tokens: float) -> OptimizerConfig:
    """Return nano's optimizer with the rates that suit this model, batch and length of a run."""
    ratios = {
        "width": model.width / TUNED.model.width,
        "depth": model.blocks / TUNED.model.blocks,
        "batch": tokens_per_step / TUNED.tokens_per_step,
        "tokens": tokens / TUNED_TOKENS,
    }
    rates: dict[str, Any] = {}
    for name, powers in RATES.items():
        factor = math.prod(ratio ** getattr(powers, what) for what, ratio in ratios.items())
        rates[name] = float(f"{getattr(TUNED.optimizer, name) * factor:.3g}")
    return replace(TUNED.optimizer, **rates)
