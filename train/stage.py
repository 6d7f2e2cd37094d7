"""From a recipe to a finished run: what all stages of training share, in the order in which it happens.

What a stage brings is `Stage`, beside the loop, which uses all of it.
"""

import dataclasses
import math
from collections.abc import Callable

from engine.checkpoint import Checkpoint
from engine.config import Recipe, override
from engine.errors import InputError
from engine.run import Run
from engine.runtime import Runtime, measured_peak, random_state, seed_everything, set_random_state
from train.loop import Loop, Outcome, Stage
from train.parallel import should_compile
from train.report import write_report
from train.tracking import Console, Metrics, MetricsFile, Tracker, Wandb, read_metrics, require_wandb

# Even a short run prepares this much text, so that a larger budget (--resume) finds more to read.
LEAST_TOKENS = 1_000_000


# Reads the data and makes the stage of a recipe.
Prepare = Callable[[Recipe], Stage]


def run_stage(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, prepare: Prepare, *, resume: bool, wandb: bool
) -> Outcome:
    """Run the stage that `prepare` makes of the recipe, and leave everything in the run's folder.

    `resume` goes on from the newest checkpoint. Raises InputError for what the user can mend, TrainingError where the
    loss stays not finite.
    """
    if wandb:
        require_wandb()
    processes = runtime.processes
    seed_everything(recipe.loop.seed, deterministic=recipe.loop.deterministic)
    peak = sum(each for (each,) in processes.gather(measured_peak(runtime)))
    runtime = dataclasses.replace(runtime, peak_flops=peak)
    if not resume:
        # Settled now, so that a resumed run depends neither on the machine nor on how busy it is.
        recipe = override(recipe, "precision", runtime.precision)
        recipe = override(recipe, "data.tokens", recipe.data.tokens or most_tokens(recipe, peak))

    stage = prepare_first(recipe, run, runtime, prepare, resume=resume)
    recipe = stage.recipe
    model = stage.model(recipe.model)
    found = processes.from_main(
        lambda: run.find_checkpoint(notice=console.say) if resume and run.has_checkpoint() else None
    )
    if stage.base and not found:
        model.load_state_dict(stage.base.tensors("model"))
    model.compute_dtype = runtime.dtype
    model.checkpoint_activations = recipe.loop.checkpoint_activations

    at_its_end = found is not None and require_budget(stage, run, found)
    if processes.main:
        run.write_recipe(recipe)
    # Only the main process writes down and says what all of them do.
    step = found.step if found else 0
    trackers = open_trackers(recipe, run, console, step, wandb=wandb) if processes.main else []

    def log(metrics: Metrics) -> None:
        for tracker in trackers:
            tracker.log(metrics)

    loop = Loop(model, stage, run, runtime, log, console.say if processes.main else lambda message: None)
    if found:
        loop.resume(found)
        console.say(f"resuming {run.path} after step {loop.step:,}")
        if at_its_end:
            console.say(f"{run.path} has come to its end: all of its {stage.budget.describe()} are done")
    elif resume:
        console.say(f"{run.path} has no checkpoint yet: starting from the first step")
    layout = [loop.layout.description] if processes.count > 1 else []
    for line in (*describe(stage, runtime), *layout, *stage.notes):
        console.say(line)
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
    """Return how many tokens the run can use at most: no more need to be prepared. None where it reads whole epochs."""
    budget = recipe.budget
    if budget.epochs is not None:
        return None
    if budget.minutes is not None:
        # Few training steps reach half the speed of a bare matrix product.
        needed = 60 * budget.minutes * peak / 2 / recipe.model.flops_per_token
    else:
        needed = budget.tokens or (budget.steps or 0) * recipe.tokens_per_step
    # Validation data is held out of the same documents, and the last batch must be full.
    return max(LEAST_TOKENS, math.ceil(needed) + recipe.tokens_per_step)


def prepare_first(recipe: Recipe, run: Run, runtime: Runtime, prepare: Prepare, *, resume: bool) -> Stage:
    """Let the main process prepare the data before the others, who then find it. All go on from the same state."""
    processes = runtime.processes
    with processes.first():
        if processes.main and not resume:
            run.write_recipe(recipe)
        try:
            stage = prepare(recipe)
        except Exception:
            # Whatever went wrong: an unfinished folder would make the next try fail.
            if processes.main and not resume:
                run.discard_preparation()
            raise
    stage = dataclasses.replace(stage, recipe=processes.collect(stage.recipe)[0])
    # The main process may have drawn random numbers for what the others have only read.
    set_random_state(processes.collect(random_state(runtime.device))[0], runtime.device)
    return stage


def require_budget(stage: Stage, run: Run, found: Checkpoint) -> bool:
    """Return whether the budget of a run is spent. Raises InputError for a new budget that leaves nothing to do."""
    state = found.values("state")
    spent = stage.budget.progress(state["step"], state["seconds"]) >= 1
    if spent and stage.recipe.budget != run.read_recipe().budget:
        raise InputError(
            f"{run.path} has done {state['step']:,} steps in {state['seconds'] / 60:.1f} minutes: of a budget of "
            f"{stage.budget.describe()} nothing is left; give more, all counted from the first step"
        )
    return spent


def open_trackers(recipe: Recipe, run: Run, console: Console, step: int, *, wandb: bool) -> list[Tracker]:
    """Return what takes the numbers of a run that goes on after `step`."""
    trackers: list[Tracker] = [console, MetricsFile(run.metrics, step)]
    if wandb:
        earlier = read_metrics(run.metrics)
        trackers.append(Wandb(run.path, run.path.name, dataclasses.asdict(recipe), console.say, earlier))
    return trackers


def describe(stage: Stage, runtime: Runtime) -> list[str]:
    """Return every derived value of a run, for a person, before it starts."""
    recipe, budget, peak = stage.recipe, stage.budget, runtime.peak_flops
    model, loop, optimizer = recipe.model, recipe.loop, recipe.optimizer
    extent = budget.describe()
    if budget.steps:
        extent += f", {stage.amounts.steps(budget.steps, budget.steps / budget.steps_per_epoch)}"
        hours = budget.steps * recipe.tokens_per_step * model.flops_per_token / peak / 3600
        extent += f"; at least {hours:,.1f} hours at the speed of bare matrix products" if hours > 1 else ""
    rows = f"{loop.batch} x {model.context} = {recipe.tokens_per_step:,} tokens a step"
    rows += f", {loop.micro_batch} rows at a time" if loop.micro_batch else ""
    return [
        f"model      {model.parameters / 1e6:,.1f}M parameters: {model.blocks} blocks, {model.width} wide, "
        f"{model.heads} heads, context {model.context}, vocabulary {model.vocab_size:,}",
        f"data       {recipe.data.source}: {stage.amounts.data}",
        f"batch      {stage.amounts.step or rows}",
        f"optimizer  {optimizer.kind}, {recipe.schedule.shape} schedule, {100 * recipe.schedule.warmup:g}% warm-up",
        f"budget     {extent}",
        f"machine    {runtime.describe()}{', compiled' if should_compile(recipe, runtime) else ''}; "
        f"one large matrix product: {peak / 1e12:.3g} TFLOP/s",
    ]
