"""From one number to a recipe: a model's shape, learning rates, batch and length, and the loss to expect of it.

It is arithmetic, without a tensor. What is tuned is tuned small, on nano, and carried to other sizes by power laws
(Yang et al., arXiv:2203.03466). All constants stand in the table below, which says what is measured
(bench/README.md) and what is assumed. A test holds the losses to bench/results/laws.json.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.config import ORIGIN, PRESETS, BudgetConfig, ModelConfig, OptimizerConfig, Recipe


@dataclass(frozen=True)
class Powers:
    """The exponents by which a learning rate follows width, blocks, tokens a step, and tokens of the whole run."""

    width: float = 0.0
    depth: float = 0.0
    batch: float = 0.0
    tokens: float = 0.0


# Muon's step has the same spectral norm at every width, so its rate stays (Bernstein and Newhouse, arXiv:2409.20325).
# A table's rate stays as well, and a head's falls with its inputs (muP). With a batch rates rise by its root (Malladi
# et al., arXiv:2205.10287); with the length of a run they fall, here by tokens^-0.16, over longer runs by -0.32 (Bjorck
# et al., arXiv:2409.19913). All is measured over factors of 3 to 4 alone (bench/README.md, "Rates that transfer").
RATES = {
    "matrix_rate": Powers(depth=-0.3, batch=0.5, tokens=-0.25),
    "embedding_rate": Powers(batch=0.5, tokens=-0.25),
    "head_rate": Powers(width=-1.0, batch=0.5, tokens=-0.25),
    "norm_rate": Powers(batch=0.5, tokens=-0.25),
}
# Below so many tokens of a run rates rise no further: nothing was measured there, and they would explode.
LEAST_TOKENS = 150_000
# A built-in story has at least so many tokens.
TOKENS_PER_STORY = 150
# Tokens a step grow by this power of the tokens of the run (Zhang et al., arXiv:2410.21676; 0.43 was measured for the
# largest step that costs 1%), between two bounds.
BATCH_POWER, LEAST_BATCH, MOST_BATCH = 0.5, 2048, 2**20
# So wide for each block: nano's 32, between tiny's 21 and large's 43; thin and deep is better below a billion (Liu et
# al., arXiv:2402.14905).
ASPECT = 32
LEAST_BLOCKS, MOST_BLOCKS = 2, 100
# The vocabulary grows by this power of the blocks, such that its tables keep to the weights inside blocks as in Tao et
# al., arXiv:2407.13623. Fewer pieces than nano's were worse on little text, too (bench/README.md).
VOCABULARY_POWER, MOST_VOCABULARY = 1.5, 32_768


@dataclass(frozen=True)
class Law:
    """A loss of N million weights after D million tokens: floor + (of_weights N^-p + of_tokens D^-q)^power.

    So Kaplan et al. have it (arXiv:2001.08361, equation 1.5), without the floor. With few tokens sizes hardly differ,
    with many they do. A sum of separate terms (Hoffmann et al., arXiv:2203.15556) has them differ alike, and meets
    short runs far worse.
    """

    floor: float
    of_weights: float
    weights_power: float
    of_tokens: float
    tokens_power: float
    power: float

    def __call__(self, weights: float, tokens: float) -> float:
        both = self.of_weights * weights**-self.weights_power + self.of_tokens * tokens**-self.tokens_power
        above: float = both**self.power
        return self.floor + above


@dataclass(frozen=True)
class Loss(Law):
    """Bits per byte of held-out text, for millions of weights and of fresh tokens: a law times a factor."""

    size: Literal["blocks", "blocks and head", "all"]  # which weights count
    factor: float  # of this text, beside the one whose runs were fitted
    spread: float  # the standard deviation of the logarithm of what was measured around it
    weights: tuple[float, float]  # the fewest and the most of the runs that it was fitted to, in millions, as counted
    tokens: tuple[float, float]

    def __call__(self, weights: float, tokens: float) -> float:
        return self.factor * super().__call__(weights, tokens)


# By the source of the data: one law, fitted to 32 runs on synthetic stories, and a factor for each text, of 12 runs on
# TinyStories and 8 on the Pile (bench/README.md, "A forecast"). ASSUMED: the floor. Short runs do not tell 0 from
# 0.35, and so the spread of what is far holds both.
_RUNS = Loss(
    0.2, 0.257, 0.815, 0.933, 0.477, 0.409,
    size="blocks and head", factor=1.0, spread=0.02, weights=(0.356, 7.27), tokens=(0.15, 6.0),
)  # fmt: skip
LOSSES = {"tinystories": replace(_RUNS, factor=0.779), "dsir-pile": replace(_RUNS, factor=1.46, spread=0.04)}
# What each decade of weights or tokens beyond the runs of a fit adds to its spread.
SPREAD_PER_DECADE = 0.036
# By this share of itself a loss stands higher at the full learning rate than where that has fallen to 0.
UNDECAYED = 0.05
# Text that comes again counts as new for at most so many times, in the end (Muennighoff et al., arXiv:2305.16264), and
# for fewer where it has few tokens for a weight: so many for each of them.
REPEATS, REPEATS_BY_TOKENS_PER_WEIGHT = 15.4, 1.1


def as_fresh(tokens: float, unique: float, repeats: float) -> float:
    """Return how many fresh tokens are worth as much as these, of which so many are unique.

    repeats: for how many more times the unique ones count as new, in the end (Muennighoff et al., equation 5).
    """
    fresh = min(tokens, unique)
    return fresh * (1 + repeats * (1 - math.exp((1 - tokens / fresh) / repeats)))


@dataclass(frozen=True)
class Reference:
    """What a reference model reached: nats per token, and how many bytes of text a token stands for."""

    loss: float
    bytes_per_token: float

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) / self.bytes_per_token


# By preset. ASSUMED bytes per token: tokenizers of 28,000 pieces give 4.2 on held-out stories of a sample; on the Pile
# one from a sample gives 3.8 on other and 4.3 on its own text.
REFERENCES = {"tiny": Reference(1.15, 4.2), "large": Reference(2.0, 4.0)}
# Tokens of all training text, ASSUMED: 1.91 GB by its data card, at 4.2 bytes per token.
EPOCHS = {"tinystories": 455_000_000}

# What was tuned, and for which length of a run (bench/README.md, "What helped and what did not").
TUNED = PRESETS["nano"]
TUNED_TOKENS = 598_016
# Nano's batch is right for runs up to its own budget: steps of 4 rows learn hardly more from a token.
BATCH_TOKENS = TUNED.budget.tokens or 0


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
    members = [shape(depth) for depth in range(LEAST_BLOCKS, MOST_BLOCKS + 1)]
    return min(members, key=lambda model: abs(math.log(model.parameters / parameters)))


def batch(tokens: float, context: int, multiple: int = 1) -> int:
    """Return the rows of a step for a run of so many tokens: a multiple of the processes that share them."""
    wanted: float = TUNED.tokens_per_step * (tokens / BATCH_TOKENS) ** BATCH_POWER
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
        "tokens": max(tokens, LEAST_TOKENS) / TUNED_TOKENS,
    }
    rates: dict[str, Any] = {}
    for name, powers in RATES.items():
        factor = math.prod(ratio ** getattr(powers, what) for what, ratio in ratios.items())
        rates[name] = float(f"{getattr(TUNED.optimizer, name) * factor:.3g}")
    return replace(TUNED.optimizer, origin=ORIGIN, **rates)


def recipe(model: ModelConfig, tokens: float, processes: int = 1) -> Recipe:
    """Return nano's recipe, carried to a model and to the length of its run."""
    tokens = min(max(tokens, 1.0), 1e15)  # as many as a budget takes
    rows = batch(tokens, model.context, processes)
    steps = math.ceil(tokens / (rows * model.context))
    return replace(
        TUNED,
        name=f"depth-{model.blocks}",
        model=model,
        budget=BudgetConfig(tokens=math.ceil(tokens)),
        data=replace(TUNED.data, documents=max(TUNED.data.documents or 0, round(tokens / TOKENS_PER_STORY))),
        optimizer=optimizer(model, rows * model.context, tokens),
        loop=replace(TUNED.loop, batch=rows, log_every=1 if steps < 10_000 else 10),
    )


def explain(recipe: Recipe, tokens: float, size: str, length: str, processes: int = 1) -> list[str]:
    """Return what of a recipe follows from its blocks and its tokens, and why: lines for a person.

    `size` and `length` say where these two come from.
    """
    model, own = recipe.model, shape(recipe.model.blocks)
    rows = batch(tokens, model.context, processes)
    ratio = f"{TUNED.tokens_per_step:,} x ({tokens:,.0f} / {BATCH_TOKENS:,} tokens)^{BATCH_POWER:g}"
    pieces = f"{TUNED.model.vocab_size:,} x ({model.blocks} / {TUNED.model.blocks})^{VOCABULARY_POWER:g}"
    lines = (
        ("width", model.width, own.width, f"{ASPECT} for each block, in multiples of 64 from 512 on"),
        ("heads", model.heads, own.heads, f"each {own.head_dim} wide: 32, and 64 from a width of 512 on"),
        ("vocabulary", model.vocab_size, own.vocab_size, f"{pieces}, at most {MOST_VOCABULARY:,}"),
        ("batch", recipe.loop.batch, rows, f"rows of {model.context}: {ratio} a step, at least {LEAST_BATCH:,}"),
    )
    reasons = [
        f"{name:10} {value:,}: {why if value == law else f'as asked; by the law {law:,}'}"
        for name, value, law, why in lines
    ]
    return [f"size       {model.blocks} blocks: {size}", *reasons, f"length     {tokens:,.0f} tokens: {length}"]


@dataclass(frozen=True)
class Forecast:
    """Bits per byte: nine runs in ten end between `low` and `high`."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} bits per byte ({self.low:.3f} to {self.high:.3f})"


def forecast(
    model: ModelConfig, tokens: float, text: str, *, epoch: float = math.inf, rate: float = 0.0
) -> Forecast | None:
    """Return what a model should reach after so many tokens of a text, of which `epoch` differ; None if none knows it.

    text: the source of the data, of which the fewest tokens that were measured are the fewest that can be foretold.
    rate: the share of the peak learning rate at which the run is by then.
    """
    law = LOSSES.get(text)
    if law is None or tokens < 1e6 * law.tokens[0]:
        return None
    n = _millions(model, law)
    d = as_fresh(tokens, epoch, min(REPEATS, REPEATS_BY_TOKENS_PER_WEIGHT * epoch / 1e6 / n)) / 1e6
    middle = law(n, d) * (1 + UNDECAYED * rate)
    beyond = sum(
        max(0.0, math.log10(least / value), math.log10(value / most))
        for value, (least, most) in ((n, law.weights), (d, law.tokens))
    )
    factor = math.exp(1.645 * (law.spread + SPREAD_PER_DECADE * beyond))
    return Forecast(middle / factor, middle, middle * factor)


def _millions(model: ModelConfig, law: Loss) -> float:
    """Return the weights of a model that a law counts, in millions."""
    head = model.outputs * model.width
    of = {"blocks": model.matmul_parameters - head, "blocks and head": model.matmul_parameters, "all": model.parameters}
    return of[law.size] / 1e6


def known(text: str) -> str:
    """Return the text whose law decides where that of `text` is not known."""
    return text if text in LOSSES else "tinystories"


def optimal_tokens(model: ModelConfig, text: str) -> int:
    """Return for how many tokens a model of this size is the best use of the work: more of either gains as much.

    At the largest size that was measured these are 20 for each weight, as others have found of any size (Hoffmann et
    al., arXiv:2203.15556): beyond it they stay so.
    """
    law = LOSSES[known(text)]
    weights = _millions(model, law)
    most = min(weights, law.weights[1])
    of_weights = law.weights_power * law.of_weights / most**law.weights_power
    tokens: float = (law.tokens_power * law.of_tokens / of_weights) ** (1 / law.tokens_power)
    return int(1e6 * tokens * weights / most)


def best_shape(learnt: Callable[[ModelConfig], float], text: str) -> ModelConfig:
    """Return the member of the family that ends best in a time, in which each learns so many tokens (0: it cannot)."""

    def reached(model: ModelConfig) -> float:
        found = forecast(model, learnt(model), known(text))
        return math.inf if found is None else found.middle

    return min(map(shape, range(LEAST_BLOCKS, MOST_BLOCKS + 1)), key=reached)
