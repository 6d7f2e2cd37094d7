"""What a run is made of: frozen dataclasses, the three presets, and typed overrides (`--set model.blocks=6`)."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from engine.errors import InputError

# The source of data that others have trained a model on: nothing can be read from it.
IMPORTED = "imported"
# Settings that may name a place on a disk.
PATHS = ("base", "data.source", "data.tokenizer", "alignment.reward")


def _require(config: Any, group: str, names: tuple[str, ...], good: Callable[[Any], bool], expected: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not good(value):
            raise InputError(f"{group}.{name} is {value}; it must be {expected}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the decoder. `vocab_size` is a wish until a tokenizer is trained, then what the text supported."""

    vocab_size: int
    width: int
    blocks: int
    heads: int
    context: int
    rotary_base: float = 10_000.0
    norm_eps: float = 1e-5
    # What GPT-NeoX and Pythia do otherwise. The share is that of each head's dimensions which tell positions apart.
    rotary_share: float = 1.0
    parallel_residual: bool = False
    biases: bool = False
    # A reward model's: one number a token, instead of a score for every piece.
    scalar_head: bool = False

    def __post_init__(self) -> None:
        _require(self, "model", ("vocab_size", "width", "blocks", "heads", "context"), lambda n: n >= 1, "at least 1")
        _require(self, "model", ("rotary_base", "norm_eps"), lambda x: x > 0, "above 0")
        _require(self, "model", ("rotary_share",), lambda share: 0 < share <= 1, "above 0 and at most 1")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise InputError(
                f"model.width {self.width} does not divide into {self.heads} heads of an even size; "
                f"choose a width that is a multiple of {2 * self.heads}"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise InputError(
                f"model.rotary_share {self.rotary_share} rotates {self.rotary_dim} of a head's {self.head_dim} "
                "dimensions; it must be an even number, and not 0"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of each head rotate: the first ones."""
        return int(self.head_dim * self.rotary_share)

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for a token."""
        return 1 if self.scalar_head else self.vocab_size

    @property
    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied with: the blocks and the head, not the embedding."""
        return 12 * self.blocks * self.width**2 + self.outputs * self.width

    @property
    def parameters(self) -> int:
        vectors = 2 * self.blocks + 1
        if self.biases:
            # Of the norms, and of four linear layers with outputs 3 + 1 + 4 + 1 times the width.
            vectors += vectors + 9 * self.blocks
        return self.matmul_parameters + (self.vocab_size + vectors) * self.width

    @property
    def flops_per_token(self) -> int:
        """Of one training step: 6 per weight (2 forward, 4 backward), and causal attention over a full context."""
        return 6 * self.matmul_parameters + 6 * self.blocks * self.width * self.context


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from. See train/data/sources.py for the names that `source` knows."""

    source: str = "stories"
    # Used, with a notice, where the Hub cannot be reached and the source was not asked for by name.
    fallback: str | None = None
    column: str | None = None
    # Of conversations, where they are not the obvious ones.
    prompt_column: str | None = None
    response_column: str | None = None
    messages_column: str | None = None
    # Of preferences: the answers that were liked better and worse; None are the columns chosen and rejected.
    chosen_column: str | None = None
    rejected_column: str | None = None
    # Read and tokenize while training, in the order of the data, and prepare nothing but what is held out.
    stream: bool = False
    # A run, or a file, to take the tokenizer from where the data has none yet; None trains one.
    tokenizer: str | None = None
    # How many documents at most; None is all. The built-in stories never end, so they need a number.
    documents: int | None = None
    # How many tokens to prepare at most; None is as many as the budget can use.
    tokens: int | None = None
    # The share held out for validation where the source has no validation split of its own.
    holdout: float = 0.02
    # How many validation tokens an evaluation reads, at most: during the run, and once at its end.
    evaluation_tokens: int = 50_000
    final_evaluation_tokens: int = 500_000

    def __post_init__(self) -> None:
        if self.messages_column and (self.prompt_column or self.response_column):
            raise InputError("name --prompt-column and --response-column together, or --messages-column alone")
        _require(self, "data", ("holdout",), lambda share: 0 < share < 1, "between 0 and 1")
        counts = ("documents", "tokens", "evaluation_tokens", "final_evaluation_tokens")
        _require(self, "data", counts, lambda n: n >= 1, "at least 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for embedding, head and norms; Muon (or AdamW too) for the matrices inside the blocks."""

    kind: Literal["muon", "adamw"] = "muon"
    embedding_rate: float = 0.01
    head_rate: float = 0.003
    norm_rate: float = 0.003
    matrix_rate: float = 0.02
    # Of all of PPO's critic: it has to learn sooner than the policy that it judges.
    critic_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-10
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        rates = ("embedding_rate", "head_rate", "norm_rate", "matrix_rate", "critic_rate", "weight_decay")
        _require(self, "optimizer", rates, lambda x: x >= 0, "at least 0")
        _require(self, "optimizer", ("beta1", "beta2"), lambda x: 0 <= x < 1, "at least 0 and below 1")
        _require(self, "optimizer", ("clip", "eps"), lambda x: x > 0, "above 0")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as shares of it: rise for `warmup`, then fall to `floor` of the peak."""

    shape: Literal["cosine", "wsd"] = "wsd"
    warmup: float = 0.02
    # Only for wsd (warm up, stay, decay): the share at the end over which the rate falls, in a straight line.
    decay: float = 0.7
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.warmup < 1 and 0 <= self.decay <= 1 and 0 <= self.floor <= 1):
            raise InputError("schedule.warmup, schedule.decay and schedule.floor are shares: between 0 and 1")


@dataclass(frozen=True)
class BudgetConfig:
    """How long to train. Exactly one is set."""

    steps: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        chosen = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if len(chosen) != 1:
            raise InputError(
                f"a run needs exactly one of --steps, --tokens, --epochs, --minutes; it has {chosen or 'none'}"
            )
        ((name, value),) = chosen.items()
        if not 0 < value < math.inf:
            raise InputError(f"budget.{name} is {value}; it must be above 0, and finite")


@dataclass(frozen=True)
class LoopConfig:
    """The training loop. A batch is counted in rows of one context each."""

    batch: int = 16
    # Rows in one forward and backward pass; None is the whole batch. Halved by itself when memory runs out.
    micro_batch: int | None = None
    log_every: int = 1
    # Steps between evaluations (and checkpoints); None is ten times over the run, whatever its length.
    evaluate_every: int | None = None
    save_every: int | None = None
    # Where save_every is None, a checkpoint is at least this often.
    save_minutes: float = 10.0
    keep: int = 2
    samples: int = 3
    # torch.compile; None decides by the device.
    compile: bool | None = None
    # Of many processes: a share of the model on each (FSDP) instead of all of it; None decides by the memory.
    shard: bool | None = None
    # Compute what is inside a block again in the backward pass instead of keeping it: less memory, a third more work.
    checkpoint_activations: bool = False
    # How long a process waits for another one before it gives up.
    timeout_minutes: float = 10.0
    seed: int = 0
    # Refuse operations that vary from run to run (only on a GPU are there any); some are slower without them.
    deterministic: bool = False

    def __post_init__(self) -> None:
        counts = ("batch", "micro_batch", "log_every", "evaluate_every", "save_every", "keep")
        _require(self, "loop", counts, lambda n: n >= 1, "at least 1")
        _require(self, "loop", ("samples",), lambda n: n >= 0, "at least 0")
        _require(self, "loop", ("save_minutes", "timeout_minutes"), lambda x: x > 0, "above 0")
        _require(self, "loop", ("seed",), lambda n: 0 <= n < 2**62, "at least 0 and below 2**62")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise InputError(f"loop.batch {self.batch} is not a multiple of loop.micro_batch {self.micro_batch}")


@dataclass(frozen=True)
class RewardConfig:
    """The loss of a reward model: by how much the chosen answer has to win, and how strongly the two are drawn to 0."""

    margin: float = 0.0
    centring: float = 0.01
    # A reward that is beta times the log of how much likelier an answer is than the base finds it, without a head.
    implicit: bool = False
    beta: float = 0.5

    def __post_init__(self) -> None:
        _require(self, "reward", ("margin", "centring"), lambda x: x >= 0, "at least 0")
        _require(self, "reward", ("beta",), lambda x: x > 0, "above 0")


@dataclass(frozen=True)
class AlignmentConfig:
    """How a policy learns from rewards (ppo, grpo) or from preferences (dpo, ipo). KL is in nats."""

    method: Literal["none", "ppo", "grpo", "dpo", "ipo"] = "none"
    # Of ppo and grpo: the run of a reward model, or "program", which can be asked about the built-in stories.
    reward: str = "program"
    # Of a reward model: the SHA-256 of its weights. Another one would change what is learnt in the middle of a run.
    reward_weights: str | None = None
    # What a nat of KL to the reference costs in units of the reward; of dpo and ipo, the same thing's inverse slope.
    beta: float = 0.15
    # The KL of an answer that ppo's beta is steered to; None leaves beta as it is. The run stops above the budget.
    kl_target: float | None = None
    kl_budget: float = 20.0
    # Answers drawn before the policy changes, how many to each prompt (grpo), and how often all of them are learnt.
    answers: int = 128
    group: int = 8
    passes: int = 4
    temperature: float = 1.0
    max_tokens: int | None = None
    # Taken from the reward of an answer that does not end.
    missing_end: float = 1.0
    clip: float = 0.2
    lam: float = 0.95
    value_weight: float = 0.1
    # Of ppo: the first rounds, in which only the critic learns: a reward model has never seen half an answer.
    critic_rounds: int = 0
    # Of dpo: the share of preferences believed to be wrong.
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _require(self, "alignment", ("answers", "passes", "max_tokens"), lambda n: n >= 1, "at least 1")
        at_least_0 = ("beta", "missing_end", "value_weight", "critic_rounds")
        _require(self, "alignment", at_least_0, lambda x: x >= 0, "at least 0")
        _require(self, "alignment", ("kl_target", "kl_budget", "temperature", "clip"), lambda x: x > 0, "above 0")
        _require(self, "alignment", ("lam",), lambda x: 0 <= x <= 1, "between 0 and 1")
        _require(self, "alignment", ("label_smoothing",), lambda x: 0 <= x < 0.5, "at least 0 and below 0.5")
        if self.kl_target is not None and self.method not in ("none", "ppo"):
            raise InputError(f"alignment.kl_target steers the beta of ppo; {self.method} has a fixed one")
        if self.group < 2 or self.answers % self.group:
            raise InputError(f"alignment.group is {self.group}; it must be 2 or more and divide {self.answers} answers")


@dataclass(frozen=True)
class Recipe:
    """A whole run: everything that decides its outcome but the machine."""

    name: str
    model: ModelConfig
    budget: BudgetConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Has the model learnt conversations (engine/chat_template.py)? A base model only goes on from what it is given.
    chat: bool = False
    # Of a finetuned or a reward model: the run that it began with, the step of its checkpoint, and the SHA-256 of the
    # weights, by which it is known wherever it stands.
    base: str | None = None
    base_step: int | None = None
    base_weights: str | None = None

    def __post_init__(self) -> None:
        if self.data.stream and self.budget.epochs is not None:
            raise InputError("nobody knows the length of a stream: give --tokens, --steps or --minutes, not epochs")

    @property
    def scores(self) -> bool:
        """Is it a reward model, which scores texts and writes none?"""
        return self.model.scalar_head or self.reward.implicit

    @property
    def tokens_per_step(self) -> int:
        return self.loop.batch * self.model.context

    @property
    def tokens_per_pass(self) -> int:
        return (self.loop.micro_batch or self.loop.batch) * self.model.context


PRESETS = {
    "nano": Recipe(
        name="nano",
        model=ModelConfig(vocab_size=4096, width=128, blocks=4, heads=4, context=256),
        data=DataConfig(source="stories", documents=100_000),
        budget=BudgetConfig(tokens=3_000_000),
        # Measured in bench/README.md: small batches and high rates make the most of a few minutes.
        optimizer=OptimizerConfig(embedding_rate=0.02, head_rate=0.01),
        loop=LoopConfig(batch=8),
    ),
    # The reference model's recipe: 6 epochs of TinyStories, 178 rows of 256 a step, test loss 1.15.
    "tiny": Recipe(
        name="tiny",
        model=ModelConfig(vocab_size=28_000, width=256, blocks=12, heads=8, context=256),
        data=DataConfig(source="tinystories", fallback="stories"),
        budget=BudgetConfig(epochs=6),
        loop=LoopConfig(batch=178, log_every=10),
    ),
    # The reference model's recipe: 7 billion tokens of the DSIR-filtered Pile, 30 rows of 512 a step, loss 2.0.
    "large": Recipe(
        name="large",
        model=ModelConfig(vocab_size=28_000, width=1024, blocks=24, heads=16, context=512),
        data=DataConfig(source="dsir-pile", fallback="stories"),
        optimizer=OptimizerConfig(embedding_rate=0.006, head_rate=0.001),
        budget=BudgetConfig(tokens=7_000_000_000),
        loop=LoopConfig(batch=30, log_every=10),
    ),
}


def preset(name: str) -> Recipe:
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


Config = TypeVar("Config")


def override(config: Config, path: str, value: Any) -> Config:
    """A copy of a configuration with one value replaced, named by its dotted path. Text is parsed to the field's type.

    Raises InputError for a path that does not exist (listing those that do) or a value of another type.
    """
    name, _, rest = path.partition(".")
    hints = typing.get_type_hints(type(config))
    if name not in hints:
        raise InputError(f"no setting is called {name!r} here; there are {', '.join(hints)}")
    current = getattr(config, name)
    if dataclasses.is_dataclass(current):
        if not rest:
            fields = ", ".join(f"{name}.{inner.name}" for inner in dataclasses.fields(current))
            raise InputError(f"{name} is a group of settings: name one of {fields}")
        value = override(current, rest, value)
    elif rest:
        raise InputError(f"{name} is a single setting: {path!r} goes too deep")
    else:
        value = _typed(name, value, hints[name])
    return dataclasses.replace(config, **{name: value})  # type: ignore[type-var]


def override_text(config: Config, setting: str) -> Config:
    """`override` from one `path=value` text."""
    path, equals, value = setting.partition("=")
    if not equals:
        raise InputError(f"--set takes path=value, such as model.blocks=6; it got {setting!r}")
    try:
        return override(config, path.strip(), value.strip())
    except InputError as error:
        raise InputError(f"--set {setting}: {error}") from None


def _typed(name: str, value: Any, kind: Any, *, parse: bool = True) -> Any:
    """The value, if it is of this type; with `parse` also the value that a text spells."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value not in choices:
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        return value
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None or (parse and isinstance(value, str) and value.lower() == "none"):
            return None
        kind = next(choice for choice in choices if choice is not type(None))
    try:
        typed = _parse(value, kind) if parse and isinstance(value, str) else value
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


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` wrote. Raises InputError where a value is missing, unknown or of another type."""
    recipe: Recipe = _build(Recipe, values, "recipe")
    return recipe


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a group of settings, not {values!r}")
    hints = typing.get_type_hints(kind)
    if unknown := set(values) - set(hints):
        raise InputError(f"{where} holds settings that this version does not know: {', '.join(sorted(unknown))}")
    built = {
        name: _build(hints[name], value, f"{where}.{name}")
        if dataclasses.is_dataclass(hints[name])
        else _typed(f"{where}.{name}", value, hints[name], parse=False)
        for name, value in values.items()
    }
    try:
        return kind(**built)
    except TypeError as error:
        raise InputError(f"{where} is not whole: {error}") from None
