"""Pretraining: from a recipe to a run folder. Text -> tokenizer -> shards -> batches -> the loop -> report."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from engine.chat_template import text_ends
from engine.checkpoint import Checkpoint
from engine.config import ModelConfig, Recipe, override
from engine.errors import InputError
from engine.generate import document_prompt, generate
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime, measured_peak, random_state, seed_everything, set_random_state
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer, train_tokenizer
from train.averages import Measures
from train.data.loader import Batch, PackedLoader, PieceSource
from train.data.shards import Progress, TokenShards, is_prepared, prepare
from train.data.sources import HubUnreachable, Source, open_source
from train.data.stream import StreamLoader
from train.evaluate import evaluate_loss
from train.loop import Batches, Loop, Outcome, Task, should_compile
from train.parallel import lay_out
from train.report import write_report
from train.schedule import Budget
from train.tracking import MetricsFile, Tracker, Trackers, Wandb, read_metrics, require_wandb

# A tokenizer learns little from more text than this per piece of its vocabulary.
SAMPLE_BYTES_PER_PIECE = 1000
# Even a short run gets this much text, so that going on with it (--resume with a larger budget) has something to read.
LEAST_TOKENS = 1_000_000
# Where the Hub cannot be reached: so many of the built-in stories stand in for a data set that ends.
FALLBACK_STORIES = 100_000
SPLITS_USED = ("train", "validation")
SAMPLE_TOKENS = 200
EVALUATION_BATCH_TOKENS = 8192


class Console(Tracker, Protocol):
    """A tracker that can also show how far the preparation of data has come."""

    def preparing(self, what: str) -> Progress: ...


class Corpus(PieceSource, Protocol):
    """What a loader packs, and how much of it there is."""

    @property
    def tokens(self) -> int: ...

    @property
    def bytes(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Data:
    tokenizer: Tokenizer
    # None where it is a stream, whose length nobody knows.
    train: Corpus | None
    validation: Corpus


class Supply(Batches, Protocol):
    """The batches of a stage, which may end something when they are no longer needed."""

    def batches_per_epoch(self) -> float: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage of training brings to `run_stage`."""

    data: Data
    batches: Supply
    # What the model says after so much training, for samples.md.
    sample: Callable[[Any], list[str]]
    # The weights to begin with; None are those that `model` makes.
    base: Checkpoint | None = None
    model: Callable[[ModelConfig], GPT] = GPT
    # Where it is not next-token loss: what is learnt, and measured on so many tokens, so many at a time.
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    evaluate: Callable[[Any, int, int], dict[str, float]] | None = None
    # As of train.loop.Task.
    measures: Measures = dataclasses.field(default_factory=Measures)
    critic: nn.Module | None = None
    # Lines for the console before the run starts.
    notes: tuple[str, ...] = ()


def pretrain(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, *, resume: bool = False, wandb: bool = False
) -> Outcome:
    """Train as the recipe says and leave everything in the run's folder. `resume` goes on from its newest checkpoint.

    Raises InputError for what the user can mend, TrainingError where the loss stays not finite.
    """

    def prepare(recipe: Recipe) -> tuple[Recipe, Stage]:
        return read_documents(recipe, run, runtime, console, resume=resume)

    return run_stage(recipe, run, runtime, console, prepare, resume=resume, wandb=wandb)


def read_documents(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, *, resume: bool
) -> tuple[Recipe, Stage]:
    """The stage that learns documents, and the recipe with what the data decided."""
    batches: Supply
    if recipe.data.stream:
        recipe, data, batches = stream_data(recipe, run, runtime, console)
    else:
        recipe, data = prepare_data(recipe, run, console, resume=resume)
        assert data.train is not None
        batches = PackedLoader(
            data.train, recipe.tokens_per_pass, recipe.model.context, seed=recipe.loop.seed, processes=runtime.processes
        )
    return recipe, Stage(data, batches, lambda model: begin_documents(model, data.tokenizer, recipe))


def run_stage(
    recipe: Recipe,
    run: Run,
    runtime: Runtime,
    console: Console,
    prepare: Callable[[Recipe], tuple[Recipe, Stage]],
    *,
    resume: bool,
    wandb: bool,
) -> Outcome:
    """From a recipe to a finished run: what pretraining and finetuning share. `prepare` reads the data."""
    if wandb:
        require_wandb()
    processes = runtime.processes
    seed_everything(recipe.loop.seed, deterministic=recipe.loop.deterministic)
    peak = sum(each for (each,) in processes.gather(measured_peak(runtime)))
    if not resume:
        # Settled here, so that a resumed run does not depend on the machine or its mood.
        recipe = override(recipe, "precision", runtime.precision)
        recipe = override(recipe, "data.tokens", recipe.data.tokens or most_tokens(recipe, peak))
    with processes.first():
        if processes.main and not resume:
            run.write_recipe(recipe)
        try:
            recipe, stage = prepare(recipe)
        except Exception:
            # Whatever was wrong: what is left half made would refuse the next try.
            if processes.main and not resume:
                run.discard_preparation()
            raise
    recipe = processes.collect(recipe)[0]
    # The main process may have drawn random numbers where the others found what it had prepared.
    set_random_state(processes.collect(random_state(runtime.device))[0], runtime.device)
    data, batches = stage.data, stage.batches
    model = stage.model(recipe.model)
    found = processes.from_main(
        lambda: run.find_checkpoint(notice=console.say) if resume and run.has_checkpoint() else None
    )
    if stage.base and not found:
        model.load_state_dict(stage.base.tensors("model"))
    model.compute_dtype = runtime.dtype
    model.checkpoint_activations = recipe.loop.checkpoint_activations
    steps_per_epoch = batches.batches_per_epoch() * recipe.tokens_per_pass / recipe.tokens_per_step
    budget = Budget(recipe.budget, recipe.tokens_per_step, steps_per_epoch)
    at_its_end = found is not None and require_budget(recipe, budget, run, found)
    if processes.main:
        run.write_recipe(recipe)
    trackers: list[Tracker] = []
    if processes.main:
        trackers = [console, MetricsFile(run.metrics, found.step if found else 0)]
    if processes.main and wandb:
        earlier = read_metrics(run.metrics)
        trackers.append(Wandb(run.path, run.path.name, dataclasses.asdict(recipe), console.say, earlier))
    tracker = Trackers(trackers)
    task = stage_task(recipe, stage, run)
    layout = lay_out(recipe, runtime)
    loop = Loop(model, task, recipe, budget, run, runtime, tracker, peak, recipe.model.flops_per_token, layout)
    if found:
        loop.resume(found)
        console.say(f"resuming {run.path} after step {loop.step:,}")
        if at_its_end:
            console.say(f"{run.path} has come to its end: all of its {budget.describe()} are done")
    elif resume:
        console.say(f"{run.path} has no checkpoint yet: starting from the first step")
    how = [layout.description] if processes.count > 1 else []
    for line in (*describe(recipe, runtime, data, budget, peak), *how, *stage.notes):
        console.say(line)
    try:
        outcome = loop.train()
        if outcome.stopped_by is None and processes.main:
            write_report(run, recipe, runtime.describe(), runtime.peak_memory())
        return outcome
    finally:
        batches.close()
        tracker.close()


def require_budget(recipe: Recipe, budget: Budget, run: Run, found: Checkpoint) -> bool:
    """Whether the budget of a run is spent. Raises InputError where it is a new one, which leaves nothing to do."""
    state = found.values("state")
    spent = budget.progress(state["step"], state["seconds"]) >= 1
    if spent and recipe.budget != run.read_recipe().budget:
        raise InputError(
            f"{run.path} has done {state['step']:,} steps in {state['seconds'] / 60:.1f} minutes: of a budget of "
            f"{budget.describe()} nothing is left; give more, all counted from the first step"
        )
    return spent


def stage_task(recipe: Recipe, stage: Stage, run: Run) -> Task:
    lengths = stage.data.tokenizer.byte_lengths

    def evaluate(model: GPT, final: bool) -> dict[str, float]:
        tokens = recipe.data.final_evaluation_tokens if final else recipe.data.evaluation_tokens
        # No more at a time than a training pass holds, and far less than it holds with its activations.
        at_a_time = min(recipe.tokens_per_pass, EVALUATION_BATCH_TOKENS)
        if stage.evaluate:
            return stage.evaluate(model, tokens, at_a_time)
        return evaluate_loss(model, stage.data.validation, lengths, tokens=tokens, tokens_per_batch=at_a_time)

    def sample(model: GPT, step: int) -> None:
        if recipe.loop.samples:
            texts = stage.sample(model)
            with open(run.samples, "a") as file:
                file.write(f"## Step {step:,}\n\n" + "\n\n---\n\n".join(texts) + "\n\n")

    of_text = torch.from_numpy(lengths) if stage.loss is None else None
    return Task(stage.loss or packed_loss, stage.batches, evaluate, sample, of_text, stage.measures, stage.critic)


def packed_loss(model: GPT, batch: Batch) -> torch.Tensor:
    """Next-token loss of packed sequences, summed, in nats."""
    return model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)


def prepare_data(recipe: Recipe, run: Run, console: Console, *, resume: bool) -> tuple[Recipe, Data]:
    """Tokenizer and token files for a recipe; the recipe comes back with what the data decided (vocabulary, source).

    Goes on where an interrupted preparation of the same run stopped.
    """
    folder = Path(recipe.data.source)
    if not is_prepared(folder):
        folder = run.data
        if not all(is_prepared(folder, split) for split in SPLITS_USED):
            recipe, source = find_source(recipe, console)
            prepare_source(recipe, source, run, console)
    tokenizer = Tokenizer.load(folder)
    if not run.tokenizer.exists():
        tokenizer.save(run.path / tokenizer.file_name)
    elif Tokenizer.load(run.tokenizer).fingerprint != tokenizer.fingerprint:
        raise InputError(f"{folder} has another tokenizer than {run.path} began with; choose other --data")
    shards = [TokenShards.open(folder, split, tokenizer.fingerprint) for split in SPLITS_USED]
    for each in shards:
        each.check(tokenizer.eod)
    model = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(recipe, model=model), Data(tokenizer, *shards)


def stream_data(recipe: Recipe, run: Run, runtime: Runtime, console: Console) -> tuple[Recipe, Data, StreamLoader]:
    """As `prepare_data`, but only the held-out documents are prepared; the others come as this process's batches."""
    if is_prepared(recipe.data.source):
        raise InputError(f"{recipe.data.source} is prepared already: train on it without --stream")
    recipe, source = find_source(recipe, console)
    console.say(source.describe())
    tokenizer = find_tokenizer(recipe, source, run, console)
    most = recipe.data.final_evaluation_tokens
    progress = console.preparing("validation")
    validation = prepare(source, tokenizer, run.data, "validation", max_tokens=most, progress=progress)
    console.say(f"validation {source.describe_read(validation.documents)}")
    console.say(f"held out   {source.held_out_by}")
    recipe = override(recipe, "model.vocab_size", tokenizer.vocab_size)
    batches = StreamLoader(
        source, tokenizer, validation, recipe.tokens_per_pass, recipe.model.context, processes=runtime.processes
    )
    return recipe, Data(tokenizer, None, validation), batches


def find_tokenizer(recipe: Recipe, source: Source, run: Run, console: Console) -> Tokenizer:
    """The run's tokenizer; where it has none yet, the one that the recipe names, or else one trained on the source."""
    if run.tokenizer.exists():
        return Tokenizer.load(run.tokenizer)
    if recipe.data.tokenizer is not None:
        tokenizer = Tokenizer.load(recipe.data.tokenizer)
    else:
        sample_bytes = SAMPLE_BYTES_PER_PIECE * recipe.model.vocab_size
        documents = source.documents("train")
        tokenizer = train_tokenizer(documents, recipe.model.vocab_size, sample_bytes=sample_bytes, notice=console.say)
    tokenizer.save(run.path / tokenizer.file_name)
    return tokenizer


def prepare_source(recipe: Recipe, source: Source, run: Run, console: Console) -> None:
    """Tokenize the source into the run's folder."""
    console.say(source.describe())
    tokenizer = find_tokenizer(recipe, source, run, console)
    limits = {"train": recipe.data.tokens, "validation": recipe.data.final_evaluation_tokens}
    for split, limit in limits.items():
        shards = prepare(source, tokenizer, run.data, split, max_tokens=limit, progress=console.preparing(split))
        # A source that writes its documents itself reads no rows, and leaves none out.
        if source.rows:
            console.say(f"{split:10} {source.describe_read(shards.documents)}")
    console.say(f"held out   {source.held_out_by}")


def find_source(recipe: Recipe, console: Console) -> tuple[Recipe, Source]:
    """The source of a recipe, or its fallback, with a notice, where the Hub cannot be reached."""
    data = recipe.data
    try:
        source = open_source(data.source, column=data.column, holdout=data.holdout, limit=data.documents)
        source.check()
    except HubUnreachable as error:
        if data.fallback is None:
            raise
        reason = str(error).partition(";")[0]
        console.say(f"{reason}; using the built-in {data.fallback} instead (--data {data.source} insists)")
        documents = data.documents or FALLBACK_STORIES
        recipe = dataclasses.replace(
            recipe,
            data=dataclasses.replace(data, source=data.fallback, fallback=None, column=None, documents=documents),
        )
        return recipe, open_source(data.fallback, limit=documents)
    if data.source == "stories" and data.documents is None and recipe.budget.epochs is not None:
        raise InputError("the built-in stories never end, so an epoch needs a number: --set data.documents=40000")
    return recipe, source


def most_tokens(recipe: Recipe, peak: float) -> int | None:
    """More tokens than this the run cannot use: no need to prepare them. None where it reads whole epochs."""
    budget = recipe.budget
    if budget.epochs is not None:
        return None
    if budget.minutes is not None:
        # At half the speed of a bare matrix product, which few training steps reach.
        needed = 60 * budget.minutes * peak / 2 / recipe.model.flops_per_token
    else:
        needed = budget.tokens or (budget.steps or 0) * recipe.tokens_per_step
    # Validation is held out of the same stream, and the last batch must fill up.
    return max(LEAST_TOKENS, math.ceil(needed) + recipe.tokens_per_step)


def describe(recipe: Recipe, runtime: Runtime, data: Data, budget: Budget, peak: float) -> list[str]:
    """Every derived value of a run, for a person, before it starts."""
    model, loop, optimizer = recipe.model, recipe.loop, recipe.optimizer
    extent = budget.describe()
    if budget.steps:
        tokens = budget.steps * recipe.tokens_per_step
        hours = tokens * model.flops_per_token / peak / 3600
        # Conversations and pairs leave padding, and answers may be short.
        extent += f", {'up to ' if recipe.chat else ''}{tokens:,} tokens"
        extent += f", {tokens / data.train.tokens:.2f} epochs" if data.train else ""
        extent += f"; at least {hours:,.1f} hours at the speed of bare matrix products" if hours > 1 else ""
    amount = f"{data.train.tokens:,} tokens to train on" if data.train else "streamed"
    text = data.train or data.validation
    return [
        f"model      {model.parameters / 1e6:,.1f}M parameters: {model.blocks} blocks, {model.width} wide, "
        f"{model.heads} heads, context {model.context}, vocabulary {model.vocab_size:,}",
        f"data       {recipe.data.source}: {amount}, {data.validation.tokens:,} tokens to validate; "
        f"{text.bytes / text.tokens:.2f} bytes per token",
        f"batch      {loop.batch} x {model.context} = {recipe.tokens_per_step:,} tokens a step"
        + (f", {loop.micro_batch} rows at a time" if loop.micro_batch else ""),
        f"optimizer  {optimizer.kind}, {recipe.schedule.shape} schedule, {100 * recipe.schedule.warmup:g}% warm-up",
        f"budget     {extent}",
        f"machine    {runtime.describe()}{', compiled' if should_compile(recipe, runtime) else ''}; "
        f"one large matrix product: {peak / 1e12:.3g} TFLOP/s",
    ]


def begin_documents(model: GPT, tokenizer: Tokenizer, recipe: Recipe) -> list[str]:
    """Documents that the model begins by itself. The same seeds at every step, to compare."""
    prompts = [document_prompt(tokenizer, "")] * recipe.loop.samples
    return say(model, tokenizer, prompts, text_ends(tokenizer, chat=recipe.chat))


def say(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], ends: frozenset[int]) -> list[str]:
    """How the model goes on after each prompt."""
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=0)
    most = min(SAMPLE_TOKENS, model.config.context - 1)
    completions = generate(model, tokenizer, prompts, sampling, max_tokens=most, stop_ids=ends)
    return [completion.text.strip() for completion in completions]
