"""From --depth, --params or a length of time to a whole recipe, by engine/laws.py; and how fast a machine trains it."""

import dataclasses
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cli.options import Size
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.config import ModelConfig, Recipe
    from engine.planning import Machine, Rate
    from engine.runtime import Runtime

    Learnt = Callable[[ModelConfig, float], float]

RESULTS = Path("bench/results")
NO_SIZE = (
    "name a preset, or say how large or how long: gpt train nano (or tiny, or large), gpt train --depth 6, "
    "gpt train --params 30M, gpt train --minutes 10"
)


def name_of(preset: str | None, size: Size, minutes: float | None) -> str:
    """Return what a run is called whose size was given in one of these ways. Raises InputError where by none, or two.

    A preset's minutes are the length of its run; without one they choose the size, too.
    """
    given = {"a preset": preset, "--depth": size.depth, "--params": size.params}
    if len(named := [name for name, value in given.items() if value is not None]) > 1:
        raise InputError(f"{' and '.join(named)} both say how large the model is: leave out one of them")
    if preset is not None:
        return preset
    if size.depth is not None:
        return f"depth-{size.depth}"
    if size.params is not None:
        count(size.params)
        return f"params-{size.params.strip()}"
    if minutes is None:
        raise InputError(NO_SIZE)
    return f"minutes-{minutes:g}"


def count(text: str) -> float:
    """Read a number of parameters: 30M, 1.5B, 800k, 3e7."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kMB]?)", text.strip())
    try:
        number = float(found[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}[found[2]] if found else 0.0
    except ValueError:
        number = 0.0
    if not 1e3 <= number <= 1e12:
        raise InputError(f"--params is {text!r}; it must be a number from 1k to 1000B, such as 30M")
    return number


def derive(
    name: str,
    size: Size,
    minutes: float | None,
    learnt: "Learnt",
    adjust: "Callable[[Recipe], Recipe]",
    processes: int = 1,
) -> "tuple[Recipe, list[str]]":
    """Return the recipe of a size, or of the size that ends best in so many minutes, and the reasons for its values.

    learnt: how many tokens a model learns in so many seconds. adjust: puts into a recipe what other options ask for;
    the rest follows from that, too. Each process gets as many rows of a step.
    """
    from engine import laws

    text = adjust(laws.TUNED).data.source
    by = f"by the law of {laws.known(text)}"
    if size.depth is not None:
        model, why = laws.shape(size.depth), "as asked"
    elif size.params is not None:
        model = laws.shape_of_parameters(count(size.params))
        why = f"{model.parameters / 1e6:,.1f}M parameters: the nearest to {size.params}"
    else:
        model = laws.best_shape(lambda each: learnt(each, 60 * (minutes or 0.0)), text)
        why = f"of all sizes the one that should end best after {minutes:g} minutes on this machine ({by})"

    # Each round follows what the one before has settled: shape and budget, then the batch of so many steps.
    best = float(laws.optimal_tokens(model, text))
    recipe, tokens = adjust(laws.recipe(model, best, processes)), best
    for _ in range(4):
        budget = recipe.budget
        if budget.minutes is not None:
            tokens = learnt(recipe.model, 60 * budget.minutes) or 1.0
        elif budget.epochs is None:
            tokens = float(budget.tokens or (budget.steps or 0) * recipe.tokens_per_step)
        recipe = adjust(laws.recipe(recipe.model, tokens, processes))
    length = "as asked" if tokens != best else f"the best use of work at this size ({by})"
    if recipe.budget.minutes is not None:
        length = f"{recipe.budget.minutes:g} minutes at {tokens / recipe.budget.minutes / 60:,.0f} tokens/s"
    elif recipe.budget.epochs is not None:
        length = "ASSUMED for batch and rates: how long an epoch is shows when the data has been read"
    optimizer = laws.optimizer(recipe.model, recipe.tokens_per_step, tokens)
    recipe = dataclasses.replace(adjust(dataclasses.replace(recipe, optimizer=optimizer)), name=name)
    return recipe, laws.explain(recipe, tokens, why, length, processes)


def learning_on(machine: "Callable[[Recipe], tuple[Machine, Rate, str]]", processes: int = 1) -> "Learnt":
    """Return what says how many tokens a model learns on a machine in so many seconds: 0 where it finds no room."""
    from engine import config, laws, planning

    @cache
    def rate_of(model: "ModelConfig") -> "tuple[Machine, Rate, str]":
        # Rates of GPUs were measured for presets: that of the nearest in size is taken.
        near = min(config.PRESETS.values(), key=lambda each: abs(math.log(each.model.parameters / model.parameters)))
        return machine(dataclasses.replace(near, model=model))

    def learnt(model: "ModelConfig", seconds: float) -> float:
        where, rate, precision = rate_of(model)
        recipe = laws.recipe(model, processes * seconds * rate.flops / model.flops_per_token, processes)
        found = planning.plan(recipe, where, rate, precision, gpus=processes, nodes=1, shard=False)
        return seconds * recipe.tokens_per_step / found.step_seconds if found.fits else 0.0

    return learnt


def machine_of(gpu: str, recipe: "Recipe", results: Path) -> "tuple[Machine, Rate, str]":
    """Return a machine by its name in engine/planning.py, how fast it trains this model, and in which precision."""
    from engine import planning, runtime

    if gpu == "cpu":
        return this_machine(runtime.choose("cpu", recipe.precision), recipe, results)
    precision = "bf16" if recipe.precision == "auto" else recipe.precision
    machine = planning.MACHINES[gpu]
    measured = planning.measured_rate(recipe, precision, gpu, results)
    return machine, measured or planning.assumed_rate(machine, precision), precision


def this_machine(here: "Runtime", recipe: "Recipe", results: Path = RESULTS) -> "tuple[Machine, Rate, str]":
    """Return what a runtime is, how fast it trains this model, and in which precision."""
    from bench.harness import device_name
    from engine import pace, planning, precision

    if recipe.precision == "auto":
        here, _ = precision.for_training(here, recipe.model)
    if here.device.type == "cpu":
        flops = pace.training_flops(here, recipe.model.flops_per_token)
        source = f"{flops / 1e9:,.0f} GFLOP/s, by steps of models of about this size, timed just now"
        return planning.this_cpu(), planning.Rate(flops, source), here.precision
    name = device_name(here)
    rate = planning.measured_rate(recipe, here.precision, name, results)
    if rate is None:
        peak, share = _peak(here), planning.EFFICIENCY
        rate = planning.Rate(share * peak, f"{share:.0%}, ASSUMED, of {peak / 1e12:.2f} TFLOP/s, measured just now")
    return planning.gpu_like(name), rate, here.precision


@cache
def _peak(here: "Runtime") -> float:
    from engine.runtime import measured_peak

    return measured_peak(here)
