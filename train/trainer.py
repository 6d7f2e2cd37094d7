"""run_stage, which all stages of training share: from a recipe to a finished run and its report, in that order."""

import dataclasses
import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from engine import checkpoint, disk
from engine.checkpoint import Checkpoint, at_step
from engine.config import DataConfig, Recipe, from_dict, override, settings, to_dict
from engine.errors import DiskError, InputError
from engine.laws import Forecast, forecast
from engine.lora import adapt
from engine.planning import EFFICIENCY, checkpoint_bytes
from engine.run import Run, versions
from engine.runtime import Runtime, measured_peak, random_state, seed_everything, set_random_state
from train.data.sources import pinned
from train.evaluation import write_evaluations
from train.loop import Loop
from train.parallel import require_memory, should_compile
from train.stage import Outcome, Stage, State
from train.tracking import Band, Console, MetricsFile, Tracker, Wandb, evaluation_parts, read_metrics, require_wandb

# Even a short run prepares this much text, so that a larger budget (--resume) finds more to read.
LEAST_TOKENS = 1_000_000

# Reads the data and makes the stage of a recipe.
Prepare = Callable[[Recipe], Stage]


def run_stage(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, prepare: Prepare, *, resume: bool, wandb: bool
) -> Outcome:
    """Run the stage that `prepare` makes of the recipe, and leave everything in the run's folder.

    `resume` continues from the newest checkpoint. Raises InputError for what the user can fix, TrainingError if the
    loss stays not finite.
    """
    if wandb:
        require_wandb()
    processes = runtime.processes
    require_memory(recipe, runtime)
    seed_everything(recipe.loop.seed, deterministic=recipe.loop.deterministic)
    peak = sum(each for (each,) in processes.gather(measured_peak(runtime)))
    runtime = dataclasses.replace(runtime, peak_flops=peak)
    if not resume:
        # Both depend on this machine and on its measured speed. They are written into the recipe now, so that a resume
        # does not derive them again.
        recipe = override(recipe, "precision", runtime.precision)
        recipe = override(recipe, "data.tokens", recipe.data.tokens or most_tokens(recipe, peak))

    stage = prepare_first(recipe, run, runtime, prepare, console.say, resume=resume)
    recipe = stage.recipe
    model = stage.model(recipe.model)
    step = processes.from_main(
        lambda: run.find_checkpoint(notice=console.say, recipe=recipe).step if resume and run.has_checkpoint() else None
    )
    found = None if step is None else at_step(run.checkpoints, step)
    if stage.base and not found:
        model.load_state_dict(stage.base.weights())
    if stage.begin and not found:
        stage.begin(model)
    model.compute_dtype = runtime.dtype
    if recipe.lora.rank:
        adapt(model, recipe.lora)
    model.checkpoint_activations = recipe.loop.checkpoint_activations

    at_its_end = found is not None and require_budget(stage, run, found)
    if processes.main:
        run.write_recipe(recipe)
    # Only the main process writes to files and to the console.
    trackers = open_trackers(recipe, run, console, step or 0, wandb=wandb) if processes.main else []
    if processes.main:
        trackers.append(Band(partial(expected, stage), console.say))
    loop = Loop(model, stage, run, runtime, trackers, console.say if processes.main else lambda message: None)
    if found:
        loop.resume(found)
        console.say(f"resuming {run.path} after step {loop.step:,}")
        if at_its_end:
            console.say(f"{run.path} has come to its end: all of its {stage.budget.describe()} are done")
    elif resume:
        console.say(f"{run.path} has no checkpoint yet: starting from the first step")
    layout = [loop.layout.description] if loop.layout.description else []
    for line in (*describe(stage, runtime), *layout, *stage.notes):
        console.say(line)
    if processes.main:
        run.begin()
    try:
        outcome = loop.train()
        if outcome.stopped_by is None and processes.main:
            write_report(run, recipe, runtime.describe(), runtime.peak_memory())
        return outcome
    finally:
        stage.batches.close()
        for tracker in trackers:
            tracker.close()


def most_tokens(recipe: Recipe, peak: float) -> int | None:
    """Return how many tokens the run can use at most, and so must be prepared; None if it reads whole epochs."""
    budget = recipe.budget
    if budget.epochs is not None:
        return None
    if budget.minutes is not None:
        # Few training steps reach half the speed of a bare matrix product.
        needed = 60 * budget.minutes * peak / 2 / recipe.flops_per_token
    else:
        needed = budget.tokens or (budget.steps or 0) * recipe.tokens_per_step
    # Validation data is held out of the same documents, and the last batch must be full.
    return max(LEAST_TOKENS, math.ceil(needed) + recipe.tokens_per_step)


def prepare_first(
    recipe: Recipe, run: Run, runtime: Runtime, prepare: Prepare, say: Callable[[str], None], *, resume: bool
) -> Stage:
    """Let the main process prepare the data first; the others wait, and then open what it has prepared.

    All of them then have the main process's recipe and the state of its random generators.
    """
    processes = runtime.processes
    if not resume:
        # All processes, and those of a later resume, read the commit that the main one has found.
        data = processes.from_main(lambda: vars(pinned(recipe.data)))
        recipe = dataclasses.replace(recipe, data=DataConfig(**data))
    with processes.first():
        if processes.main:
            require_room(recipe, run, say)
            if not resume:
                run.write_recipe(recipe)
        stage = prepare(recipe)
        if processes.main:
            # The data that was prepared may have filled the disk, and has settled the vocabulary.
            require_room(stage.recipe, run)
    stage = dataclasses.replace(stage, recipe=from_dict(processes.collect(to_dict(stage.recipe))[0]))
    # The main process may have drawn random numbers for what the others have only read.
    set_random_state(processes.collect(random_state(runtime.device))[0], runtime.device)
    return stage


def require_room(recipe: Recipe, run: Run, say: Callable[[str], None] = lambda message: None) -> None:
    """Raise DiskError where not one checkpoint fits on the disk; say so where not all will that the run keeps."""
    size, there = checkpoint_bytes(recipe), len(checkpoint.checkpoints(run.checkpoints))
    if disk.free(run.checkpoints) < size:
        checkpoint.make_room(run.checkpoints, recipe.loop.keep)
    # Those that are kept, the best, and a new one before an old one goes.
    free, most = disk.free(run.checkpoints), max(recipe.loop.keep + 2 - there, 1) * size
    numbers = f"a checkpoint takes {disk.in_words(size)}, and {disk.in_words(free)} are free on the disk of {run.path}"
    if free < size:
        raise DiskError(f"{numbers}: make room there, or choose another folder with --out")
    if free < most:
        say(f"disk       {numbers}; with loop.keep={recipe.loop.keep} up to {disk.in_words(most)} will be wanted")


def require_budget(stage: Stage, run: Run, found: Checkpoint) -> bool:
    """Return whether the budget of a run is spent. Raises InputError if so and a new budget leaves nothing to do."""
    state = found.values("state", State)
    spent = stage.budget.progress(state.step, state.seconds) >= 1
    if spent and stage.recipe.budget != run.read_recipe().budget:
        raise InputError(
            f"{run.path} has done {state.step:,} steps in {state.seconds / 60:.1f} minutes: of a budget of "
            f"{stage.budget.describe()} nothing is left; give more, all counted from the first step"
        )
    return spent


def open_trackers(recipe: Recipe, run: Run, console: Console, step: int, *, wandb: bool) -> list[Tracker]:
    """Return the trackers of a run that continues after `step`: console, metrics.jsonl and, with wandb, W&B."""
    trackers: list[Tracker] = [console, MetricsFile(run.metrics, step, console.say)]
    if wandb:
        earlier = read_metrics(run.metrics)
        trackers.append(Wandb(run.path, run.path.name, dataclasses.asdict(recipe), console.say, earlier))
    return trackers


def expected(stage: Stage, tokens: float, rate: float = 0.0) -> Forecast | None:
    """Return what a run should have reached after so many tokens, at this share of its peak rate, where a law says."""
    recipe = stage.recipe
    if recipe.base is not None or recipe.chat or stage.byte_lengths is None:
        return None
    epoch = stage.budget.steps_per_epoch * recipe.tokens_per_step
    return forecast(recipe.model, tokens, recipe.data.source, epoch=epoch, rate=rate)


def describe(stage: Stage, runtime: Runtime) -> list[str]:
    """Return every derived value of a run, for a person, before it starts."""
    recipe, budget, peak = stage.recipe, stage.budget, runtime.peak_flops
    model, loop, optimizer = recipe.model, recipe.loop, recipe.optimizer
    extent = budget.describe()
    if budget.steps:
        extent += f", {stage.amounts.steps(budget.steps, budget.steps / budget.steps_per_epoch)}"
        hours = budget.steps * recipe.tokens_per_step * recipe.flops_per_token / peak / 3600
        extent += f"; at least {hours:,.1f} hours at the speed of bare matrix products" if hours > 1 else ""
    tokens, guess = (budget.steps or 0) * recipe.tokens_per_step, ""
    if budget.steps is None:
        tokens = int(budget.seconds * EFFICIENCY * peak / recipe.flops_per_token)
        guess = f", if {tokens:,} tokens are learnt by then"
    found = expected(stage, tokens)
    rows = f"{loop.batch} x {model.context} = {recipe.tokens_per_step:,} tokens a step"
    rows += f", {loop.micro_batch} rows at a time" if loop.micro_batch else ""
    learner, rank = str(optimizer.kind), recipe.lora.rank
    roles = ("matrix", "embedding", "head", "norm")
    rates = ", ".join(f"{role} {getattr(optimizer, f'{role}_rate'):g}" for role in roles)
    if rank:
        learner = f"adamw, of {recipe.lora.parameters(model):,} parameters in adapters of rank {rank}"
    return [
        f"model      {model.parameters / 1e6:,.1f}M parameters: {model.shape}, "
        f"context {model.context}, vocabulary {model.vocab_size:,}",
        f"data       {recipe.data.source}: {stage.amounts.data}",
        f"batch      {stage.amounts.step or rows}",
        f"optimizer  {learner}, {recipe.schedule.shape} schedule, {100 * recipe.schedule.warmup:g}% warm-up",
        *([f"rates      {rates}: {optimizer.origin}"] if optimizer.origin else []),
        f"budget     {extent}",
        *([f"forecast   {found} at the end{guess}"] if found else []),
        f"machine    {runtime.describe()}{', compiled' if should_compile(recipe, runtime) else ''}; "
        f"one large matrix product: {peak / 1e12:.3g} TFLOP/s",
    ]


def write_report(run: Run, recipe: Recipe, machine: str, peak_memory: int) -> None:
    """Write report.md and, where matplotlib is installed, loss.png, from the run's metrics."""
    metrics = read_metrics(run.metrics)
    # What was not finite is null there.
    last: dict[str, Any] = next((line for line in reversed(metrics) if "loss" in line), {})
    last = {name: value for name, value in last.items() if value is not None}
    lines = [f"# {recipe.name}: {run.path.name}", ""]
    if final := next((line for line in reversed(metrics) if "validation_loss" in line), None):
        parts = ", ".join(f"**{part}**" for part in evaluation_parts(final, "validation_"))
        tokens, step = final.get("validation_tokens") or 0, final["step"]
        lines += [f"Validation {parts} (over {tokens:,} held-out tokens, after step {step:,}).", ""]
    lines += [
        f"{last.get('step', 0):,} steps, {last.get('tokens', 0):,} tokens, {last.get('epoch', 0):.2f} epochs, "
        f"{last.get('seconds', 0) / 60:.1f} minutes, {last.get('tokens_per_second', 0):,.0f} tokens/s, "
        f"{100 * last.get('mfu', 0):.0f}% of the machine's measured peak, "
        f"{peak_memory / 2**30:.2f} GiB at most, on {machine}.",
        "",
        *(["![loss](loss.png)", ""] if plot_loss(metrics, run.loss_plot) else []),
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value, _ in settings(recipe) if value is not None),
        *(f"| {name} | {value} |" for name, value in versions().items()),
        "",
        "Samples from each evaluation are in samples.md, all numbers in metrics.jsonl.",
        "",
    ]
    disk.write_atomically(run.report, "\n".join(lines))
    write_evaluations(run)


def plot_loss(metrics: list[dict[str, Any]], path: Path) -> bool:
    """Draw training and validation loss over tokens. False, and no picture, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A loss that was not finite is null.
    trained, validated = (
        [line for line in metrics if None not in (line.get(name), line.get("tokens"))]
        for name in ("loss", "validation_loss")
    )
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")

    def points(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
        return [line["tokens"] for line in lines], [line[name] for line in lines]

    axes.plot(*points(trained, "loss"), color="#9db4d0", lw=0.8, label="training")
    axes.plot(*points(validated, "validation_loss"), color="#c2410c", marker="o", ms=4, label="validation")
    if validated:
        axes.set_title("validation " + ", ".join(evaluation_parts(validated[-1], "validation_")[:2]), fontsize=11)
    if losses := sorted(line["loss"] for line in trained):
        # The first steps fall from ln(vocabulary): shown whole, they would flatten everything that follows.
        low, high = losses[0], losses[int(0.97 * (len(losses) - 1))]
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-3)
    first = trained[0] if trained else {}
    # What a policy minimises has no unit: it is nats and rewards together.
    unit = "" if "round" in first else f" (nats per {'token' if 'bits_per_byte' in first else 'pair'})"
    axes.set(xlabel="tokens", ylabel=f"loss{unit}")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(picture := io.BytesIO(), dpi=130)
    disk.write_atomically(path, picture.getvalue())
    pyplot.close(figure)
    return True
