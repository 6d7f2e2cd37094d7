"""Pretraining: from a recipe to a run folder. Text -> tokenizer -> shards -> batches -> the loop -> report."""

import dataclasses
import math
from pathlib import Path
from typing import Protocol

import torch

from engine.config import Recipe, override
from engine.errors import InputError
from engine.generate import document_prompt, generate
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime, measured_peak, seed_everything
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer, train_tokenizer
from train.data.loader import Batch, PackedLoader
from train.data.shards import Progress, TokenShards, is_prepared, prepare
from train.data.sources import HubUnreachable, Source, open_source
from train.evaluate import evaluate_loss
from train.loop import Loop, Outcome, Task, should_compile
from train.report import write_report
from train.schedule import Budget
from train.tracking import MetricsFile, Tracker, Trackers, Wandb, require_wandb

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


@dataclasses.dataclass(frozen=True)
class Data:
    tokenizer: Tokenizer
    train: TokenShards
    validation: TokenShards


def pretrain(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, *, resume: bool = False, wandb: bool = False
) -> Outcome:
    """Train as the recipe says and leave everything in the run's folder. `resume` goes on from its newest checkpoint.

    Raises InputError for what the user can mend, TrainingError where the loss stays not finite.
    """
    if wandb:
        require_wandb()
    seed_everything(recipe.loop.seed, deterministic=recipe.loop.deterministic)
    peak = measured_peak(runtime)
    if not resume:
        # Settled here, so that a resumed run does not depend on the machine or its mood.
        recipe = override(recipe, "precision", runtime.precision)
        recipe = override(recipe, "data.tokens", recipe.data.tokens or most_tokens(recipe, peak))
        run.write_recipe(recipe)
    try:
        recipe, data = prepare_data(recipe, run, console, resume=resume)
        batches = PackedLoader(data.train, recipe.tokens_per_pass, recipe.model.context, seed=recipe.loop.seed)
    except InputError:
        if not resume:
            run.discard_preparation()
        raise
    run.write_recipe(recipe)
    model = GPT(recipe.model).to(runtime.device)
    model.compute_dtype = runtime.dtype
    budget = Budget(recipe.budget, recipe.tokens_per_step, data.train.tokens)
    found = run.find_checkpoint(notice=console.say) if resume and run.has_checkpoint() else None
    trackers: list[Tracker] = [console, MetricsFile(run.metrics, found.step if found else 0)]
    if wandb:
        trackers.append(Wandb(run.path, run.path.name, dataclasses.asdict(recipe), console.say))
    tracker = Trackers(trackers)
    task = pretraining_task(recipe, data, batches, run)
    loop = Loop(model, task, recipe, budget, run, runtime, tracker, peak, recipe.model.flops_per_token)
    if found:
        loop.resume(found)
        console.say(f"resuming {run.path} after step {loop.step:,}")
    elif resume:
        console.say(f"{run.path} has no checkpoint yet: starting from the first step")
    for line in describe(recipe, runtime, data, budget, peak):
        console.say(line)
    try:
        outcome = loop.train()
        if outcome.stopped_by is None:
            write_report(run, recipe, runtime.describe(), runtime.peak_memory())
        return outcome
    finally:
        batches.close()
        tracker.close()


def pretraining_task(recipe: Recipe, data: Data, batches: PackedLoader, run: Run) -> Task:
    def evaluate(model: GPT, final: bool) -> dict[str, float]:
        tokens = recipe.data.final_evaluation_tokens if final else recipe.data.evaluation_tokens
        # No more at a time than a training pass holds, and far less than it holds with its activations.
        at_a_time = min(recipe.tokens_per_pass, EVALUATION_BATCH_TOKENS)
        lengths = data.tokenizer.byte_lengths
        return evaluate_loss(model, data.validation, lengths, tokens=tokens, tokens_per_batch=at_a_time)

    def sample(model: GPT, step: int) -> None:
        write_samples(model, data.tokenizer, run, recipe.loop.samples, step)

    return Task(packed_loss, batches, evaluate, sample, torch.from_numpy(data.tokenizer.byte_lengths))


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
    if resume and run.tokenizer.exists() and Tokenizer.load(run.tokenizer).fingerprint != tokenizer.fingerprint:
        raise InputError(f"{folder} now has another tokenizer than {run.path} began with; start a new run")
    shards = [TokenShards.open(folder, split, tokenizer.fingerprint) for split in SPLITS_USED]
    tokenizer.save(run.path / tokenizer.file_name)
    model = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(recipe, model=model), Data(tokenizer, *shards)


def prepare_source(recipe: Recipe, source: Source, run: Run, console: Console) -> None:
    """Train the run's tokenizer, unless it has one, and tokenize the source into its folder."""
    console.say(source.describe())
    if run.tokenizer.exists():
        tokenizer = Tokenizer.load(run.tokenizer)
    else:
        sample_bytes = SAMPLE_BYTES_PER_PIECE * recipe.model.vocab_size
        documents = source.documents("train")
        tokenizer = train_tokenizer(documents, recipe.model.vocab_size, sample_bytes=sample_bytes, notice=console.say)
        tokenizer.save(run.tokenizer)
    limits = {"train": recipe.data.tokens, "validation": recipe.data.final_evaluation_tokens}
    for split, limit in limits.items():
        prepare(source, tokenizer, run.data, split, max_tokens=limit, progress=console.preparing(split))


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
        extent += f", {tokens:,} tokens, {tokens / data.train.tokens:.2f} epochs"
        extent += f"; at least {hours:,.1f} hours at the speed of bare matrix products" if hours > 1 else ""
    return [
        f"model      {model.parameters / 1e6:,.1f}M parameters: {model.blocks} blocks, {model.width} wide, "
        f"{model.heads} heads, context {model.context}, vocabulary {model.vocab_size:,}",
        f"data       {recipe.data.source}: {data.train.tokens:,} tokens to train on, "
        f"{data.validation.tokens:,} to validate; {data.train.bytes / data.train.tokens:.2f} bytes per token",
        f"batch      {loop.batch} x {model.context} = {recipe.tokens_per_step:,} tokens a step"
        + (f", {loop.micro_batch} rows at a time" if loop.micro_batch else ""),
        f"optimizer  {optimizer.kind}, {recipe.schedule.shape} schedule, {100 * recipe.schedule.warmup:g}% warm-up",
        f"budget     {extent}",
        f"machine    {runtime.describe()}{', compiled' if should_compile(recipe, runtime) else ''}; "
        f"one large matrix product: {peak / 1e12:.3g} TFLOP/s",
    ]


def write_samples(model: GPT, tokenizer: Tokenizer, run: Run, count: int, step: int) -> None:
    """Let the model begin `count` documents, and add them to samples.md. The same seeds at every step, to compare."""
    if not count:
        return
    completions = generate(
        model,
        tokenizer,
        [document_prompt(tokenizer, "")] * count,
        Sampling(temperature=0.8, top_p=0.95, seed=0),
        max_tokens=min(SAMPLE_TOKENS, model.config.context - 1),
    )
    texts = [completion.text.strip() for completion in completions]
    with open(run.samples, "a") as file:
        file.write(f"## Step {step:,}\n\n" + "\n\n---\n\n".join(texts) + "\n\n")
