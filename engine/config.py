"""What a run is made of: frozen dataclasses, the three presets, and typed overrides (`--set model.blocks=6`).

Each setting is declared here with its type, its bound, the sentence that `gpt settings` shows, and its default.
"""

import contextlib
import dataclasses
import math
import operator
import re
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Annotated, Any, Literal, TypeVar

from engine.errors import InputError, meant

# The source of data that others have trained a model on: nothing can be read from it.
IMPORTED = "imported"
# A step that finetunes an imported model has so many tokens, or two sequences.
IMPORTED_STEP = 16_384
# Settings that may name a place on a disk.
PATHS = ("base", "data.source", "data.tokenizer", "alignment.reward")
# The products of a block, by the names of their modules.
MAPS = ("attention.qkv", "attention.output", "mlp.expand", "mlp.contract")

COMPARISONS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
# A type with bounds: where a value is not None, all of them hold. Larger numbers would overflow where they are used, or
# keep a program busy that can only fail.
Count = Annotated[int, "at least 1 and at most 1000000000000000"]  # 10**15
Whole = Annotated[int, "at least 0 and at most 1000000000000000"]
Weight = Annotated[float, "at least 0 and at most 1000000000"]
Positive = Annotated[float, "above 0 and at most 1000000000"]
Sequences = Annotated[int, "at least 1 and at most 1048576"]  # 2**20
Temperature = Annotated[float, "at least 0 and at most 100"]
Penalty = Annotated[float, "above 0 and at most 100"]
AddedPenalty = Annotated[float, "at least -2 and at most 2"]
TopP = Annotated[float, "above 0 and at most 1"]
Share = Annotated[float, "at least 0 and at most 1"]
Decay = Annotated[float, "at least 0 and below 1"]
Seed = Annotated[int, "at least 0 and below 4611686018427387904"]  # 2**62
FINITE = "above 0 and at most 1000000000000000"


def marks(hint: Any) -> list[Any]:
    """Return what a type and its parts are annotated with."""
    own = list(getattr(hint, "__metadata__", ()))
    return [mark for part in typing.get_args(hint)[: 1 if own else None] for mark in marks(part)] + own


def _read_annotations(kind: Any) -> dict[str, tuple[Any, list[str]]]:
    """Return each setting's type, and what it is annotated with: bounds, and last a sentence.

    A group of settings has none. Another field without a sentence is no setting: nobody sets it by name.
    """
    hints = {name: marks(hint) for name, hint in typing.get_type_hints(kind, include_extras=True).items()}
    plain = typing.get_type_hints(kind).items()
    return {name: (hint, hints[name]) for name, hint in plain if hints[name] or dataclasses.is_dataclass(hint)}


@cache
def _limits(bound: str) -> list[tuple[Callable[[float, float], bool], float]]:
    """Return the comparisons that a bound asks for, each with its number."""
    found = re.findall(r"(at least|above|at most|below) (\S+)", bound)
    return [(COMPARISONS[how], float(limit)) for how, limit in found]


# Every request has settings of its own: to read the annotations each time would take as long as a small model's step.
_annotations: Callable[[Any], dict[str, tuple[Any, list[str]]]] = cache(_read_annotations)


class Settings:
    """A group of settings, which holds its values to their bounds."""

    def __post_init__(self) -> None:
        for name, (_, (*bounds, _)) in _annotations(type(self)).items():
            value = getattr(self, name)
            group, config, _ = type(self).__name__.partition("Config")
            check_bounds(f"{group.lower()}.{name}" if config else name, value, bounds)


def check_bounds(where: str, value: Any, bounds: Iterable[str]) -> None:
    """Raise InputError where a number is beyond one of its bounds, as NaN is beyond every one."""
    for bound in bounds if value is not None else ():
        if not all(holds(value, limit) for holds, limit in _limits(bound)):
            raise InputError(f"{where} is {value}; it must be {bound}")


def bounds_of(setting: str) -> list[str]:
    """Return the bounds of a recipe's setting, by its dotted name."""
    kind: Any = Recipe
    *groups, name = setting.split(".")
    for group in groups:
        kind = _annotations(kind)[group][0]
    return _annotations(kind)[name][1][:-1]


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The shape of the decoder."""

    vocab_size: Annotated[
        int,
        "at least 1 and at most 16777216",
        "Tokens in the vocabulary: at most this many, until a tokenizer is trained.",
    ]
    width: Annotated[int, "at least 1 and at most 65536", "Numbers that stand for a token between two blocks."]
    blocks: Annotated[int, "at least 1 and at most 1000", "Blocks of attention and MLP, one after another."]
    heads: Annotated[Count, "Attention heads of a block."]
    context: Annotated[Sequences, "Tokens that the model sees at once."]
    rotary_base: Annotated[Positive, "The base of the rotary positions."] = 10_000.0
    norm_eps: Annotated[float, "above 0 and at most 1", "What a norm adds to the variance."] = 1e-5
    rotary_share: Annotated[Share, "The share of each head's dimensions that rotate; below 1 in Pythia."] = 1.0
    parallel_residual: Annotated[bool, "Attention and MLP read the same sum, as in GPT-NeoX and Pythia."] = False
    biases: Annotated[bool, "Linear layers add biases, as in GPT-NeoX and Pythia."] = False
    scalar_head: Annotated[bool, "The head gives one number a token, which is a reward, instead of logits."] = False
    # From here on: what Llama and its relatives have.
    norm: Annotated[Literal["layer", "rms"], "LayerNorm, or RMSNorm, which subtracts no mean."] = "layer"
    mlp: Annotated[Literal["gelu", "gated"], "GELU, or one map times the SiLU of another (SwiGLU)."] = "gelu"
    mlp_width: Annotated[
        Count | None, "Numbers within the MLP; none is four times the width, of a gated one about two thirds of that."
    ] = None
    key_heads: Annotated[Count | None, "Heads of keys and values, which heads of queries share; none is all."] = None
    head_width: Annotated[Count | None, "Numbers of a head; none is the width divided by the heads."] = None
    qkv_biases: Annotated[bool, "Queries, keys and values alone add biases, as in Qwen2."] = False
    qk_norm: Annotated[bool, "RMSNorm of each head's queries and keys, as in Qwen3."] = False
    tied: Annotated[bool, "The head is the embedding."] = False
    rotary_scaling: Annotated[
        Literal["none", "linear", "llama3"], "How angles are made smaller for long contexts; llama3 keeps fast ones."
    ] = "none"
    rotary_factor: Annotated[Positive, "How many times smaller rotary_scaling makes angles."] = 1.0
    rotary_low: Annotated[Positive, "llama3: slower than so many turns in rotary_original is made smaller."] = 1.0
    rotary_high: Annotated[Positive, "llama3: faster than so many turns in rotary_original is kept."] = 4.0
    rotary_original: Annotated[Count, "llama3: the context before it was scaled."] = 8192
    window: Annotated[Count | None, "Tokens that a block with a sliding window sees, its own counted in."] = None
    pattern: Annotated[
        str, "A letter a block, over and over: f full attention, w a window, n full without rotary positions."
    ] = "f"
    score_cap: Annotated[Positive | None, "Attention scores s become cap * tanh(s / cap), as in Gemma 2."] = None
    family: Annotated[
        Literal["auto", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "smollm3"],
        "What transformers calls such a model; auto is the first that fits.",
    ] = "auto"
    start: Annotated[
        Literal["gpt2", "local", "bigrams"],
        "How weights are drawn: as in GPT-2; or by their inputs, with heads that look at the tokens just before; and "
        "with embedding and head from which token follows which in the text.",
    ] = "gpt2"
    came_with: Annotated[Count | None, "Tokens of an imported model that has got ours to chat; none is all."] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_width is None and (self.width % self.heads or (self.width // self.heads) % 2):
            raise InputError(
                f"model.width {self.width} does not divide into {self.heads} heads of an even size; "
                f"choose a width that is a multiple of {2 * self.heads}, or set model.head_width"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise InputError(
                f"model.rotary_share {self.rotary_share} rotates {self.rotary_dim} of a head's {self.head_dim} "
                "dimensions; it must be an even number, and not 0"
            )
        if self.heads % self.kv_heads:
            raise InputError(f"model.key_heads is {self.kv_heads}; it must divide model.heads, {self.heads}")
        if not self.pattern or not set(self.pattern) <= set("fwn"):
            raise InputError(f"model.pattern is {self.pattern!r}; it must be of the letters f, w and n")
        if ("w" in self.pattern) != (self.window is not None):
            raise InputError(
                f"model.pattern is {self.pattern!r} and model.window {self.window}; a letter w must come with a window"
            )
        if self.start == "bigrams" and self.tied:
            raise InputError("model.start is bigrams; it must be gpt2 or local where the head is the embedding")
        if self.norm == "rms" and self.biases:
            raise InputError("model.biases are those of GPT-NeoX, whose norm must be layer; see model.qkv_biases")
        if self.rotary_scaling == "llama3" and self.rotary_low >= self.rotary_high:
            raise InputError(f"model.rotary_low is {self.rotary_low}; it must be below rotary_high, {self.rotary_high}")

    @property
    def shape(self) -> str:
        """The model's shape in words."""
        keys = "" if self.kv_heads == self.heads else f" that share {self.kv_heads} of keys"
        return f"{self.blocks} blocks, {self.width} wide, {self.heads} heads{keys}"

    @property
    def head_dim(self) -> int:
        return self.head_width or self.width // self.heads

    @cached_property  # every step asks for it
    def rotary_dim(self) -> int:
        """Return how many dimensions of each head rotate: the first ones."""
        return int(self.head_dim * self.rotary_share)

    @property
    def kv_heads(self) -> int:
        """Heads of keys, and as many of values."""
        return self.key_heads or self.heads

    @property
    def cached(self) -> int:
        """Numbers that stay of a token in a cache: its keys and values of all blocks."""
        return 2 * self.blocks * self.kv_heads * self.head_dim

    @property
    def attended(self) -> int:
        """Numbers of a token that come out of all heads."""
        return self.heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def mlp_columns(self) -> int:
        """Numbers of a token within the MLP."""
        # A gated MLP's three maps have no more weights than two of four times the width, and multiples of 32, as
        # llama.cpp's eight bits have to have.
        return self.mlp_width or (32 * max(1, self.width // 12) if self.mlp == "gated" else 4 * self.width)

    def kind_of(self, layer: int) -> str:
        """Return the letter of a block: see `pattern`."""
        return self.pattern[layer % len(self.pattern)]

    def window_of(self, layer: int) -> int | None:
        return self.window if self.kind_of(layer) == "w" else None

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for a token."""
        return 1 if self.scalar_head else self.vocab_size

    @property
    def own_head(self) -> bool:
        """Return whether the head has weights of its own: a scalar one is never the embedding."""
        return self.scalar_head or not self.tied

    def maps(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return the products of a block by name: the outputs of each map that is stacked in it, and their inputs."""
        keys, hidden = self.kv_heads * self.head_dim, self.mlp_columns
        return {
            "attention.qkv": ((self.attended, keys, keys), self.width),
            "attention.output": ((self.width,), self.attended),
            "mlp.expand": ((hidden,) * (2 if self.mlp == "gated" else 1), self.width),
            "mlp.contract": ((self.width,), hidden),
        }

    @property
    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied with: the blocks and the head, not the embedding."""
        block = sum(sum(rows) * columns for rows, columns in self.maps().values())
        return self.blocks * block + self.outputs * self.width

    @property
    def parameters(self) -> int:
        biases = 0
        if self.biases or self.qkv_biases:
            stacked = {name: sum(rows) for name, (rows, _) in self.maps().items()}
            biases = sum(stacked.values()) if self.biases else stacked["attention.qkv"]
        norms = (2 * self.blocks + 1) * self.width * (2 if self.biases else 1)
        heads = 2 * self.head_dim if self.qk_norm else 0
        tables = (self.vocab_size if self.own_head else 0) * self.width
        return self.matmul_parameters + tables + norms + self.blocks * (biases + heads)

    @property
    def flops_per_token(self) -> int:
        """Count those of a training step: 6 per weight (2 forward, 4 backward), and attention over a full context."""
        windows = [min(self.window_of(layer) or self.context, self.context) for layer in range(self.blocks)]
        twice_seen = sum(window * (2 * self.context - window) // self.context for window in windows)
        return 6 * self.matmul_parameters + 6 * self.attended * twice_seen


@dataclass(frozen=True)
class DataConfig(Settings):
    """Where the text comes from."""

    source: Annotated[str, "A name that --data knows (train/data/sources.py), or a path."] = "stories"
    revision: Annotated[str | None, "The commit of a Hugging Face data set; none is the newest, and notes it."] = None
    fallback: Annotated[str | None, "What is read, with a notice, where the Hub cannot be reached."] = None
    column: Annotated[str | None, "The column of documents; none finds the obvious one."] = None
    prompt_column: Annotated[str | None, "The column of requests; none finds the obvious one."] = None
    response_column: Annotated[str | None, "The column of answers; none finds the obvious one."] = None
    messages_column: Annotated[str | None, "The column of whole conversations; none finds the obvious one."] = None
    chosen_column: Annotated[str | None, "The column of answers that were liked better; none is chosen."] = None
    rejected_column: Annotated[str | None, "The column of answers that were liked worse; none is rejected."] = None
    stream: Annotated[bool, "Read and tokenize while training; only what is held out is prepared."] = False
    tokenizer: Annotated[str | None, "A run or file with the tokenizer for data without one; none trains one."] = None
    documents: Annotated[Count | None, "Read at most this many documents; the built-in stories never end."] = None
    tokens: Annotated[Count | None, "Prepare at most this many tokens; none is what the budget can use."] = None
    holdout: Annotated[float, "above 0 and below 1", "The fraction held out if there is no validation split."] = 0.02
    evaluation_tokens: Annotated[Count, "An evaluation during the run reads at most this many tokens."] = 50_000
    final_evaluation_tokens: Annotated[Count, "The evaluation at the end reads at most this many tokens."] = 500_000

    def __post_init__(self) -> None:
        if self.messages_column and (self.prompt_column or self.response_column):
            raise InputError("name --prompt-column and --response-column together, or --messages-column alone")
        super().__post_init__()


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW for norms; Muon or AdamW for matrices."""

    kind: Annotated[
        Literal["muon", "normuon", "adamw"],
        "What learns the matrices inside the blocks, and of normuon embedding and head too.",
    ] = "muon"
    embedding_rate: Annotated[Weight, "Learning rate of the embedding at its highest."] = 0.01
    head_rate: Annotated[Weight, "Learning rate of the head at its highest."] = 0.003
    norm_rate: Annotated[Weight, "Learning rate of the norms and biases at its highest."] = 0.003
    matrix_rate: Annotated[Weight, "Learning rate of the matrices inside the blocks at its highest."] = 0.02
    critic_rate: Annotated[Weight, "Learning rate of PPO's critic, which has to learn before the policy."] = 1e-3
    adapter_rate: Annotated[Weight, "Learning rate of adapters (lora.rank) at its highest, by AdamW."] = 3e-3
    momentum: Annotated[Decay, "Muon's decay of the mean of gradients, in matrices inside the blocks."] = 0.95
    beta1: Annotated[Decay, "AdamW's decay of the mean of gradients, and normuon's in embedding and head."] = 0.9
    beta2: Annotated[Decay, "AdamW's decay of the mean of squared gradients, and normuon's of rows."] = 0.95
    eps: Annotated[Positive, "What AdamW adds to the denominator."] = 1e-10
    weight_decay: Annotated[Weight, "Decoupled weight decay of matrices."] = 0.1
    clip: Annotated[Positive, "The norm that gradients are clipped to."] = 1.0
    origin: Annotated[str | None, "Where the rates come from, in words."] = None


@dataclass(frozen=True)
class LoraConfig(Settings):
    """Adapters, which learn in place of the weights that a run begins with (engine/lora.py)."""

    rank: Annotated[int, "at least 0 and at most 65536", "The rank of adapters; at 0 the weights learn."] = 0
    alpha: Annotated[Positive, "What adapters add is multiplied by alpha / rank."] = 32.0
    maps: Annotated[str, f"What has adapters: all, or with commas between {', '.join(MAPS)}."] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.chosen) - set(MAPS):
            raise InputError(f"lora.maps holds {unknown.pop()!r}; it must be all, or of {', '.join(MAPS)}")

    @property
    def chosen(self) -> tuple[str, ...]:
        """Return the names of the maps that have adapters."""
        return MAPS if self.maps == "all" else tuple(dict.fromkeys(self.maps.replace(" ", "").split(",")))

    def parameters(self, model: ModelConfig) -> int:
        """Return how many numbers the adapters of a model have: rank for each input and each output of their maps."""
        maps = model.maps()
        return model.blocks * self.rank * sum(sum(maps[name][0]) + maps[name][1] for name in self.chosen)


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """The learning rate over the run: it rises to its peak, and falls to `floor` of it."""

    shape: Annotated[Literal["cosine", "wsd"], "wsd stays at the peak between warm-up and decay."] = "wsd"
    warmup: Annotated[Decay, "The share of the run in which the rate rises."] = 0.02
    decay: Annotated[Share, "The share of the run, at its end, in which wsd falls in a straight line."] = 0.7
    floor: Annotated[Share, "The share of the peak that is left at the end."] = 0.0


@dataclass(frozen=True)
class BudgetConfig(Settings):
    """How long to train. Exactly one is set."""

    steps: Annotated[int | None, FINITE, "Steps of the optimizer."] = None
    tokens: Annotated[int | None, FINITE, "Tokens to train on."] = None
    epochs: Annotated[float | None, FINITE, "How often all data is read."] = None
    minutes: Annotated[float | None, FINITE, "Minutes of training, to which the schedule adapts."] = None

    def __post_init__(self) -> None:
        chosen = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if len(chosen) != 1:
            raise InputError(
                f"a run needs exactly one of --steps, --tokens, --epochs, --minutes; it has {chosen or 'none'}"
            )
        super().__post_init__()


@dataclass(frozen=True)
class LoopConfig(Settings):
    """The training loop."""

    batch: Annotated[Sequences, "Sequences in a step, each as long as the context."] = 16
    micro_batch: Annotated[Sequences | None, "Sequences in one pass; none is the batch. Cut if memory runs out."] = None
    log_every: Annotated[Count, "Steps between lines of metrics."] = 1
    evaluate_every: Annotated[Count | None, "Steps between evaluations; none is ten times over the run."] = None
    save_every: Annotated[Count | None, "Steps between checkpoints; none saves by time and at evaluations."] = None
    save_minutes: Annotated[Positive, "Minutes between checkpoints, at most, where save_every is none."] = 10.0
    keep: Annotated[Count, "The number of checkpoints to keep, besides the best."] = 2
    samples: Annotated[int, "at least 0 and at most 10000", "Texts that are drawn after an evaluation."] = 3
    compile: Annotated[bool | None, "Use torch.compile; none decides by the device."] = None
    shard: Annotated[bool | None, "Each process holds a shard of the model (FSDP); none decides by memory."] = None
    checkpoint_activations: Annotated[bool, "Compute blocks again in the backward pass: less memory, slower."] = False
    timeout_minutes: Annotated[
        float, "above 0 and at most 1000000", "Minutes that a process waits for another one."
    ] = 10.0
    seed: Annotated[Seed, "Seed of all that is drawn at random."] = 0
    deterministic: Annotated[bool, "Refuse operations that vary from run to run, as some do on GPUs."] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise InputError(f"loop.batch {self.batch} is not a multiple of loop.micro_batch {self.micro_batch}")


@dataclass(frozen=True)
class RewardConfig(Settings):
    """The loss of a reward model."""

    margin: Annotated[Weight, "By how much the chosen answer has to win."] = 0.0
    centring: Annotated[Weight, "How strongly the two rewards of a pair are drawn to 0."] = 0.01
    implicit: Annotated[bool, "No head: the reward is how much likelier an answer is than the base finds it."] = False
    beta: Annotated[Positive, "An implicit reward is beta times the log of that ratio."] = 0.5


@dataclass(frozen=True)
class AlignmentConfig(Settings):
    """How a policy learns from rewards (ppo, grpo) or from preferences (dpo, ipo). KL is in nats."""

    method: Annotated[Literal["none", "ppo", "grpo", "dpo", "ipo"], "What aligns the policy."] = "none"
    reward: Annotated[str, "The run of a reward model; program checks the built-in stories."] = "program"
    reward_weights: Annotated[str | None, "SHA-256 of its weights: a resumed run takes no other."] = None
    beta: Annotated[Weight, "The price of a nat of KL; of dpo and ipo the inverse slope of the same."] = 0.15
    kl_target: Annotated[Positive | None, "The KL that ppo's beta is steered to; none leaves beta alone."] = None
    kl_budget: Annotated[Positive, "The run stops above this KL."] = 20.0
    answers: Annotated[Sequences, "Answers that are drawn before the policy changes."] = 128
    group: Annotated[int, "at least 2 and at most 1048576", "Answers to each prompt, which grpo compares."] = 8
    passes: Annotated[Count, "How often the drawn answers are learnt."] = 4
    temperature: Annotated[float, "above 0 and at most 100", "The temperature at which answers are drawn."] = 1.0
    max_tokens: Annotated[Count | None, "The longest answer; none is what the context leaves."] = None
    missing_end: Annotated[Weight, "What is taken from the reward of an answer that does not end."] = 1.0
    clip: Annotated[Positive, "How far the ratio of new to old probabilities counts."] = 0.2
    lam: Annotated[Share, "The lambda of generalised advantage estimation (ppo)."] = 0.95
    value_weight: Annotated[Weight, "The weight of the critic's loss (ppo)."] = 0.1
    critic_rounds: Annotated[Whole, "The first rounds of ppo, in which the critic learns alone."] = 0
    label_smoothing: Annotated[float, "at least 0 and below 0.5", "The share of wrong preferences (dpo)."] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_target is not None and self.method not in ("none", "ppo"):
            raise InputError(f"alignment.kl_target steers the beta of ppo; {self.method} has a fixed one")
        if self.answers % self.group:
            raise InputError(f"alignment.group is {self.group}; it must divide {self.answers} answers")


@dataclass(frozen=True)
class Recipe:
    """A whole run: everything that decides its outcome but the machine."""

    name: Annotated[str, "The preset that the recipe began as, or the imported model."]
    model: ModelConfig
    budget: BudgetConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "What matrices are multiplied in."] = "auto"
    chat: Annotated[bool, "The model has learnt conversations (engine/chat_template.py)."] = False
    base: Annotated[str | None, "The run that this one began with."] = None
    base_step: Annotated[int | None, "The step of the base's checkpoint."] = None
    base_weights: Annotated[str | None, "SHA-256 of the base's weights: it is known by them in any folder."] = None

    def __post_init__(self) -> None:
        if self.data.stream and self.budget.epochs is not None:
            raise InputError("nobody knows the length of a stream: give --tokens, --steps or --minutes, not epochs")

    @property
    def flops_per_token(self) -> int:
        """Count those of a training step. Weights that do not learn, beside adapters, take none for their gradient."""
        own = 6 * self.lora.parameters(self.model) - 2 * self.model.matmul_parameters if self.lora.rank else 0
        return self.model.flops_per_token + own

    @property
    def scores(self) -> bool:
        """True for a reward model, which scores texts and writes none."""
        return self.model.scalar_head or self.reward.implicit

    @property
    def tokens_per_step(self) -> int:
        return self.loop.batch * self.model.context

    @property
    def tokens_per_pass(self) -> int:
        return (self.loop.micro_batch or self.loop.batch) * self.model.context


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield every setting of a recipe: its dotted name, its value, and what it means.

    The class Recipe itself gives its defaults, and ... where only a preset has a value.
    """
    for name, (hint, marks) in _annotations(config if isinstance(config, type) else type(config)).items():
        if dataclasses.is_dataclass(hint):
            yield from settings(getattr(config, name, hint), f"{name}.")
        else:
            yield prefix + name, getattr(config, name, ...), marks[-1]


# What all presets have in common: Qwen3's block, which learns more from each token than GPT-NeoX's at the same cost
# (bench/README.md, "What helped and what did not").
BLOCK: dict[str, Any] = {"norm": "rms", "mlp": "gated", "qk_norm": True, "start": "bigrams"}
ORIGIN = "nano's, carried to this width, depth, batch and length by the powers in engine/laws.py"
# Measured in bench/README.md: small batches and high rates make the most of a few minutes.
NANO = OptimizerConfig("normuon", embedding_rate=0.03, head_rate=0.006, momentum=0.9, beta1=0.8)
PRESETS = {
    "nano": Recipe(
        name="nano",
        model=ModelConfig(vocab_size=4096, width=128, blocks=4, heads=4, context=256, **BLOCK),
        data=DataConfig(source="stories", documents=100_000),
        budget=BudgetConfig(tokens=3_000_000),
        optimizer=NANO,
        loop=LoopConfig(batch=8),
    ),
    # The reference model's recipe: 6 epochs of TinyStories, 178 rows of 256 a step, test loss 1.15.
    "tiny": Recipe(
        name="tiny",
        model=ModelConfig(vocab_size=28_000, width=256, blocks=12, heads=8, context=256, **BLOCK),
        data=DataConfig(source="tinystories", fallback="stories"),
        optimizer=dataclasses.replace(
            NANO, matrix_rate=0.00825, embedding_rate=0.0172, head_rate=0.00172, norm_rate=0.00172, origin=ORIGIN
        ),
        budget=BudgetConfig(epochs=6),
        loop=LoopConfig(batch=178, log_every=10),
    ),
    # The reference model's recipe: 7 billion tokens of the DSIR-filtered Pile, 30 rows of 512 a step, loss 2.0.
    "large": Recipe(
        name="large",
        model=ModelConfig(vocab_size=28_000, width=1024, blocks=24, heads=16, context=512, **BLOCK),
        data=DataConfig(source="dsir-pile", fallback="stories"),
        optimizer=dataclasses.replace(
            NANO, matrix_rate=0.00308, embedding_rate=0.0079, head_rate=0.000197, norm_rate=0.00079, origin=ORIGIN
        ),
        budget=BudgetConfig(tokens=7_000_000_000),
        loop=LoopConfig(batch=30, log_every=10),
    ),
}


def preset(name: str) -> Recipe:
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}{meant(name, PRESETS)}")
    return PRESETS[name]


Config = TypeVar("Config")


def step_rows(context: int) -> int:
    """Return how many sequences, each as long as the context, a step has that finetunes an imported model."""
    return max(2, IMPORTED_STEP // context)


def override(config: Config, path: str, value: Any) -> Config:
    """Return a copy with one value replaced, named by its dotted path. A text is read as a value of the field's type.

    Raises InputError for a path that does not exist (listing those that do) or a value of another type.
    """
    return _override(config, {path: value})


def _override(config: Config, values: dict[str, Any]) -> Config:
    fields, changes, inside = _annotations(type(config)), {}, defaultdict[str, dict[str, Any]](dict)
    for path, value in values.items():
        name, _, rest = path.partition(".")
        if name not in fields:
            like = meant(path, (each for each, _, _ in settings(config)))
            raise InputError(f"no setting is called {name!r} here; there are {', '.join(fields)}{like}")
        group = dataclasses.is_dataclass(getattr(config, name))
        if rest and not group:
            raise InputError(f"{name} is a single setting: {path!r} goes too deep")
        if group and not rest:
            inner = ", ".join(f"{name}.{each}" for each in _annotations(type(getattr(config, name))))
            raise InputError(f"{name} is a group of settings: name one of {inner}")
        if group:
            inside[name][rest] = value
        else:
            changes[name] = _typed(name, value, fields[name][0])
    changes |= {name: _override(getattr(config, name), inner) for name, inner in inside.items()}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def override_text(config: Config, *texts: str) -> Config:
    """Return what `override` does, from texts `path=value`. Together they must be right, not each beside old ones."""
    changed, values, failure = config, {}, None
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set takes path=value, such as model.blocks=6; it got {text!r}")
        values[path.strip()] = value.strip()
        try:
            changed = override(changed, path.strip(), value.strip())
        except InputError as error:
            failure = failure or InputError(f"--set {text}: {error}")
    if failure:
        with contextlib.suppress(InputError):
            return _override(config, values)
        raise failure
    return changed


def _typed(name: str, value: Any, kind: Any, *, parse: bool = True) -> Any:
    """Return the value, if it is of this type; with `parse` also the value that a text spells."""
    kinds = typing.get_args(kind) or (kind,)
    if typing.get_origin(kind) is Literal:
        if value not in kinds:
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(kinds)}{meant(str(value), kinds)}")
        return value
    parse = parse and isinstance(value, str)
    if type(None) in kinds and (value is None or (parse and value.lower() == "none")):
        return None
    kind = kinds[0]
    try:
        typed = _parse(value, kind) if parse else value
        # True is an int to Python, and an int is as good as a float.
        good = type(typed) is kind or (kind is float and type(typed) is int)
        if good and (kind is not float or math.isfinite(typed)):
            return typed
    except (ValueError, KeyError, OverflowError):
        pass
    raise InputError(f"{name} is {value!r}; it must be of type {kind.__name__}")


def _parse(text: str, kind: Any) -> Any:
    if kind is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
    if kind is int:
        number = float(text)
        return int(number) if number == int(number) else number
    return kind(text)


to_dict = dataclasses.asdict


def from_dict(values: Any, kind: Any = Recipe, where: str = "recipe") -> Any:
    """Return the recipe, or a group of its settings, that `to_dict` wrote.

    Raises InputError where a value is missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a group of settings, not {values!r}")
    fields = _annotations(kind)
    if unknown := set(values) - set(fields):
        raise InputError(f"{where} holds settings that this version does not know: {', '.join(sorted(unknown))}")
    built = {}
    for name, value in values.items():
        hint, inner = fields[name][0], f"{where}.{name}"
        group = dataclasses.is_dataclass(hint)
        built[name] = from_dict(value, hint, inner) if group else _typed(inner, value, hint, parse=False)
    try:
        return kind(**built)
    except TypeError as error:
        raise InputError(f"{where} is not whole: {error}") from None
