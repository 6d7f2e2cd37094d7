"""Every option that commands share: what it means, and which setting of a recipe it sets, is declared here once.

Besides Typer's Option, an annotation may hold three more things: the dotted name of the recipe's setting, such as
"loop.seed"; bounds, in the words of engine/config.py; and ON_RESUME, if the option may be given together with --resume.
A command takes groups of options, which are dataclasses; `grouped` shows their fields to Typer as if they were
parameters of the command, and checks every value before the command runs.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Argument, BadParameter, Option
from typer.models import ArgumentInfo, ParameterInfo

from cli.completion import offer
from cli.console import notice
from engine import config
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.model import GPT
    from engine.run import Run
    from engine.runtime import Runtime
    from engine.tokenizer import Tokenizer

ON_RESUME = object()
# Processes, machines, seconds, texts: of these nobody wants a million.
Few = Annotated[int, "at least 1 and at most 1000000"]
Blocks = Annotated[int, "at least 1 and at most 100"]

RunArgument = Annotated[Path, Argument(help="Folder of a run, such as runs/nano.", show_default=False)]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N. auto is the GPU where there is one."), ON_RESUME]
Precision = Annotated[str, Option(help="auto, fp32, bf16 or fp16. auto is the fastest here."), "precision"]
FAST = "auto, fp32, bf16, fp16, or on a CPU int8: faster at few texts at once, and not quite the same ones."
GenerationPrecision = Annotated[str, Option("--precision", help=FAST)]
CheckpointName = Annotated[str, Option("--checkpoint", help="latest, best, or a step.")]
MaxTokens = Annotated[config.Count | None, Option(help="At most this many tokens; else up to the context.")]
Temperature = Annotated[config.Temperature, Option(help="0 always takes the likeliest token.")]
TopP = Annotated[config.TopP, Option(help="Choose among the likeliest tokens that hold this share.")]
Seed = Annotated[config.Seed, Option(help="The same seed gives the same texts.")]
Column = Annotated[str | None, Option(help="The column of the text, if not the obvious one."), "data.column"]
PromptColumn = Annotated[str | None, Option(help="The column of the requests."), "data.prompt_column"]
Batch = Annotated[int | None, Option(help="Sequences in a step, each as long as the context."), "loop.batch"]
Tokens = Annotated[float | None, Option(help="Train on this many tokens, such as 5e6."), "budget.tokens", ON_RESUME]
Setting = Annotated[list[str] | None, Option("--set", help="Any of gpt settings, as model.blocks=6. Repeatable.")]
Lora = Annotated[int | None, Option(help="Train adapters of this rank, not the weights: less memory."), "lora.rank"]
WandB = Annotated[bool, Option("--wandb", help="Also record to Weights & Biases, offline without a login."), ON_RESUME]
LOOPBACK = "127.0.0.1"
Host = Annotated[str, Option(help=f"The address to listen on. Others than {LOOPBACK} need a key.")]
Port = Annotated[int, "at least 0 and at most 65535", Option(help="0 takes any that is free.")]
ApiKey = Annotated[str | None, Option(envvar="GPT_API_KEY", help="Better set as GPT_API_KEY.")]
Insecure = Annotated[bool, Option("--insecure", help="Let everybody in, from everywhere.")]


@dataclass(frozen=True)
class Machine:
    device: Device = "auto"
    precision: Precision = "auto"

    def choose(self) -> "Runtime":
        from engine import runtime

        return runtime.choose(self.device, self.precision)


@dataclass(frozen=True)
class BenchOptions(Machine):
    """These options say on which machine a benchmark runs, and where its results are written."""

    device: Device = "auto"
    precision: Precision = "auto"
    out: Annotated[Path, Option(help="Folder for the results: JSON, plots.")] = Path("bench/results")

    def choose(self) -> "Runtime":
        from engine.disk import require_writable

        require_writable(self.out / "result")
        return super().choose()


@dataclass(frozen=True)
class ModelOptions(Machine):
    """These options say which checkpoint of a run generates text, and on which machine."""

    device: Device = "auto"
    precision: GenerationPrecision = "auto"
    checkpoint: CheckpointName = "latest"

    def load(self, run: "Run") -> "tuple[GPT, Tokenizer]":
        """Load the model of a run. A damaged newest checkpoint is reported on standard error."""
        return run.load_model(self.choose(), self.checkpoint, notice)


@dataclass(frozen=True)
class SamplingOptions:
    """These options say how a text is sampled. The fields are those of cli.conversation.Settings."""

    max_tokens: MaxTokens = None
    temperature: Temperature = 0.8
    top_k: Annotated[config.Count | None, Option(help="Choose among the k likeliest tokens.")] = None
    top_p: TopP = 0.95
    min_p: Annotated[config.Decay, Option(help="Drop tokens less likely than this share of the likeliest.")] = 0.0
    repetition_penalty: Annotated[config.Penalty, Option(help="Above 1: repeat less.")] = 1.0
    presence_penalty: Annotated[config.AddedPenalty, Option(help="Above 0: write what is not there yet.")] = 0.0
    frequency_penalty: Annotated[config.AddedPenalty, Option(help="Above 0: write the same less often.")] = 0.0
    seed: Annotated[config.Seed | None, Option(help="The same seed gives the same text.")] = None


@dataclass(frozen=True)
class ConversationColumns:
    prompt_column: PromptColumn = None
    response_column: Annotated[str | None, Option(help="The column of the answers."), "data.response_column"] = None
    messages_column: Annotated[str | None, Option(help="The column of conversations."), "data.messages_column"] = None
    column: Column = None


@dataclass(frozen=True)
class PreferenceColumns:
    prompt_column: PromptColumn = None
    chosen_column: Annotated[str | None, Option(help="The column of better answers."), "data.chosen_column"] = None
    rejected_column: Annotated[str | None, Option(help="The column of worse answers."), "data.rejected_column"] = None


@dataclass(frozen=True)
class Size:
    """These options say how large a model is whose recipe engine/laws.py derives; time alone takes what ends best."""

    depth: Annotated[Blocks | None, Option(help="So many blocks; the rest follows.")] = None
    params: Annotated[str | None, Option(help="About so many parameters, such as 30M; the rest follows.")] = None
    hours: Annotated[config.Positive | None, Option(help="As --minutes, 60 times as long."), ON_RESUME] = None

    def length(self, minutes: float | None = None) -> float | None:
        """Return for how long to train, where that was given, by --hours or by --minutes."""
        if None not in (self.hours, minutes):
            raise InputError("--hours and --minutes both say how long to train: leave out one of them")
        return minutes if self.hours is None else 60 * self.hours


@dataclass(frozen=True)
class Length:
    """These options say how long to train. At most one of them may be given."""

    steps: Annotated[int | None, Option(help="Train for this many steps."), "budget.steps", ON_RESUME] = None
    tokens: Tokens = None
    epochs: Annotated[float | None, Option(help="Read the data this many times."), "budget.epochs", ON_RESUME] = None
    minutes: Annotated[float | None, Option(help="Train for this long in total."), "budget.minutes", ON_RESUME] = None


@dataclass(frozen=True)
class Sharding:
    shard: Annotated[bool, Option("--shard", help="Split the model over GPUs (FSDP)."), "loop.shard", ON_RESUME] = False


@dataclass(frozen=True)
class TrainingOptions(Machine):
    """Every command that trains takes these options."""

    out: Annotated[Path | None, Option(help="Folder of the run."), ON_RESUME] = None
    data: Annotated[str | None, Option(help="What to learn from.")] = None
    seed: Annotated[int | None, Option(help="Seed of all that is drawn at random."), "loop.seed"] = None
    setting: Setting = None
    resume: Annotated[bool, Option("--resume", help="Continue from the newest checkpoint."), ON_RESUME] = False
    overwrite: Annotated[bool, Option("--overwrite", help="Delete the run in the folder first.")] = False
    wandb: WandB = False
    gpus: Annotated[Few | None, Option(help="Train on this many GPUs, or CPU processes."), ON_RESUME] = None
    nodes: Annotated[str | None, Option(help="Machines, or MIN:MAX that may come and go."), ON_RESUME] = None
    rendezvous: Annotated[str | None, Option(help="Where machines meet: the same HOST:PORT."), ON_RESUME] = None


@dataclass(frozen=True)
class DerivedOptions(TrainingOptions):
    """These options belong to commands that start from the weights of another run: finetune, reward and rlhf."""

    checkpoint: CheckpointName = "latest"
    lora: Lora = None


def folder(default: str) -> Any:
    """Return the option --out of a command, with the folder that it has by default."""
    return Option(help=f"Folder of the run; {default} unless given.")


def given(options: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield the field, the value and the metadata of its annotation of each option that differs from its default."""
    hints = get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value not in ([], field.default):
            yield field.name, value, hints[field.name].__metadata__


def given_settings(options: Any) -> dict[str, Any]:
    """Return the settings of options that were given, by dotted name; with --resume, those that it lets change."""
    allowed = [(value, marks) for _, value, marks in given(options) if ON_RESUME in marks or not options.resume]
    return {mark: value for value, marks in allowed for mark in marks if isinstance(mark, str) and " " not in mark}


def recipe_options(options: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the value and metadata, by field, of the options that make a recipe, and so may not change later."""
    return {name: (value, marks) for name, value, marks in given(options) if ON_RESUME not in marks}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose parameters are the fields of the groups that the given one takes.

    Typer reads the options of a command from its signature and its annotations, so both are made here. The help lists
    a class's own fields before those that it inherits: so they are collected in the order of the classes, while
    dataclasses.fields would begin with the inherited ones.
    """
    keyword, parameters, groups, plain = inspect.Parameter.KEYWORD_ONLY, {}, {}, {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = parameter.annotation
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            parameters[name] = parameter.replace(kind=keyword)
            plain[name] = get_type_hints(command)[name]
            continue
        hints = get_type_hints(kind, include_extras=True)
        plain |= get_type_hints(kind)
        names = dict.fromkeys(field for each in inspect.getmro(kind) for field in inspect.get_annotations(each))
        groups[name] = kind, names
        for field in names:
            default = getattr(kind, field)
            parameters[field] = inspect.Parameter(field, keyword, default=default, annotation=hints[field])

    marks = {name: config.marks(parameter.annotation) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        # Typer reads neither the bounds inside of a type nor "" as an error.
        for info in [copy.copy(mark) for mark in marks[name] if isinstance(mark, ParameterInfo)]:
            info.parser = path if "Path" in str(plain[name]) else None
            info.autocompletion = offer(name, plain[name], info.help or "")
            texts = (mark for mark in marks[name] if isinstance(mark, str))
            parameters[name] = parameter.replace(annotation=Annotated[plain[name], info, *texts])

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        for name, value in values.items():
            if value != parameters[name].default:
                check(name, value, marks[name])
        built = {name: kind(**{field: values.pop(field) for field in names}) for name, (kind, names) in groups.items()}
        command(**built, **values)

    flat.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    flat.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return flat


def path(text: str | Path) -> Path:
    """Read a path that was typed. None is not the working directory, which Path makes of it."""
    if text == "":
        raise BadParameter("it is empty; name a file or folder, such as . for the working directory")
    return Path(text)


def typed_name(name: str, info: Any) -> str:
    """Return what a person types for a parameter: --set, or NAME where it is an argument."""
    if isinstance(info, ArgumentInfo):
        return name.upper()
    # In an annotation Typer keeps the first name of an option where its default would be.
    names = [str(each) for each in (info.default, *(info.param_decls or ())) if str(each).startswith("--")]
    return names[0].partition("/")[0] if names else f"--{name.replace('_', '-')}"


def check(name: str, value: Any, marks: list[Any]) -> None:
    """Raise InputError where an option's value is beyond its bounds, or an empty text where that is no default."""
    if isinstance(value, list | tuple):
        for each in value:
            check(name, each, marks)
        return
    shown = typed_name(name, next((mark for mark in marks if isinstance(mark, ParameterInfo)), Option()))
    if value == "":
        raise InputError(f"{shown} is empty; give it a value, or leave it out")
    for mark in marks:
        if isinstance(mark, str) and isinstance(value, int | float):
            config.check_bounds(shown, value, [mark] if " " in mark else config.bounds_of(mark))


def integers(option: str, text: str) -> list[int]:
    """Return the numbers of an option that takes several, separated by commas. Raises InputError."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise InputError(f"{option} is {text!r}; it takes whole numbers above 0 with commas between")
    return found
