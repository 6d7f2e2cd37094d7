"""gpt plan: what a run would take on many GPUs."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Column
from typer import Argument, Option

from cli import sizing, training
from cli.console import FRAMELESS, print_table
from cli.options import Batch, Few, Precision, Setting, Size, Tokens
from engine.config import Weight
from engine.errors import InputError, meant

if TYPE_CHECKING:
    from engine.config import Recipe
    from engine.planning import Machine, Plan, Rate

PRESET = "nano, tiny or large; the folder of a run, to finetune it; or none, with --depth, --params or --hours."


@dataclass(frozen=True)
class PlanOptions(Size):
    gpus: Annotated[Few, Option(help="How many in all.")] = 1
    nodes: Annotated[Few, Option(help="In how many machines.")] = 1
    gpu: Annotated[str, Option(help="h100, h200, a100, 4090, or cpu: this machine's.")] = "h100"
    shard: Annotated[bool, Option("--shard", help="FSDP2: each GPU keeps a part of the state.")] = False
    batch: Batch = None
    context: Annotated[Few | None, Option(help="Tokens in a row.")] = None
    tokens: Tokens = None
    precision: Precision = "auto"
    price: Annotated[Weight | None, Option(help="US dollars for a GPU and an hour.")] = None
    setting: Setting = None
    results: Annotated[Path, Option(help="Folder of measured rates, where there are any.")] = sizing.RESULTS


def plan(
    asked: PlanOptions,
    preset: Annotated[str | None, Argument(help=PRESET, show_default=False)] = None,
) -> None:
    """Say what a run would take on many GPUs: memory, tokens a second, hours and cost; and what it should reach.

    Example: gpt plan large --gpus 64 --nodes 8 --batch 512 --price 2.50

    Example: gpt plan --hours 10 --gpu 4090 --set data.source=dsir-pile

    Example: gpt plan runs/smollm2 --gpu 4090 --batch 8 --set lora.rank=16 --set loop.checkpoint_activations=true
    """
    from engine import config, planning

    gpus, nodes, gpu, batch = asked.gpus, asked.nodes, asked.gpu, asked.batch
    if gpus % nodes:
        raise InputError(f"--gpus {gpus} do not divide among --nodes {nodes}")
    if gpu not in (*planning.MACHINES, "cpu"):
        known = (*planning.MACHINES, "cpu")
        raise InputError(f"--gpu is {gpu!r}; it must be one of {', '.join(known)}{meant(gpu, known)}")
    minutes = asked.length()
    values = {
        "budget.tokens": asked.tokens, "budget.minutes": minutes, "loop.batch": batch,
        "model.context": asked.context, "precision": asked.precision,
    }  # fmt: skip
    name = sizing.name_of(preset, asked, minutes)

    def adjust(recipe: "Recipe") -> "Recipe":
        return training.adjust(recipe, values, asked.setting)

    if preset is None:
        learnt = sizing.learning_on(lambda recipe: sizing.machine_of(gpu, recipe, asked.results), gpus)
        recipe, reasons = sizing.derive(name, asked, minutes, learnt, adjust, gpus)
        print("\n".join(reasons))
    else:
        begin = training.named_recipe(preset)
        if preset not in config.PRESETS:
            begin = replace(begin, budget=config.BudgetConfig(epochs=1), lora=config.LoraConfig(), precision="auto")
        recipe = adjust(begin)
    notice = ""
    if rest := recipe.loop.batch % gpus:
        if batch is not None:
            raise InputError(f"--batch {batch} does not divide among {gpus} GPUs")
        notice = f"; its own {recipe.loop.batch} do not divide among {gpus}: --batch sets how many"
        recipe = config.override(recipe, "loop.batch", recipe.loop.batch + gpus - rest)
    machine, rate, chosen = sizing.machine_of(gpu, recipe, asked.results)
    found = planning.plan(recipe, machine, rate, chosen, gpus=gpus, nodes=nodes, shard=asked.shard)
    where = f"{gpus} x {machine.name}" + (f" in {nodes} nodes" if nodes > 1 else "")
    how = ("FSDP2" if asked.shard else "DDP") + ", " if gpus > 1 else ""
    learnt_alone, size = recipe.lora.parameters(recipe.model) / 1e6, recipe.model.parameters / 1e6
    adapters = f" and {learnt_alone:,.1f}M in adapters, which alone learn," if learnt_alone else ""
    print(f"{recipe.name}     {size:,.1f}M parameters{adapters} on {where}: {how}{chosen}")
    print(
        f"batch     {recipe.loop.batch} x {recipe.model.context} = {recipe.tokens_per_step:,} tokens a step"
        f"{notice}; on each GPU {found.passes} x {found.setup.tokens:,}"
    )
    _print_memory(found, machine)
    _print_speed(found, recipe, machine, rate, gpus, asked.price)
    if preset is None or preset in config.PRESETS:
        _print_forecast(found, recipe)


def _print_memory(found: "Plan", machine: "Machine") -> None:
    from engine.planning import GIB, RESERVED, peak_memory, step_memory, total

    moments, rows = step_memory(found.setup), []
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        sizes = [parts.get(part, 0) for parts in moments.values()]
        if any(sizes):
            rows.append([part, *(f"{size / GIB:.2f}" if size else "-" for size in sizes)])
    rows.append(["in all", *(f"{total(parts) / GIB:.2f}" for parts in moments.values())])
    print_table(("GiB", *(Column(each, justify="right") for each in moments)), rows, soft_wrap=True, **FRAMELESS)
    peak = f"{peak_memory(found.setup) / GIB:.1f} of {machine.memory / GIB:.0f} GiB"
    rest = f"{RESERVED / GIB:.0f} left to CUDA and its allocator, ASSUMED"
    way_out = "; --shard, more GPUs, or a smaller model or context" if not found.setup.shard else ""
    print(f"memory    {peak}, {rest}: {'fits' if found.fits else 'DOES NOT FIT' + way_out}")


def _print_speed(
    found: "Plan", recipe: "Recipe", machine: "Machine", rate: "Rate", gpus: int, price: float | None
) -> None:
    from engine.planning import LINK_EFFICIENCY

    step, tokens = found.step_seconds, recipe.tokens_per_step
    print(
        f"step      {1e3 * step:,.1f} ms: model {1e3 * found.model_seconds:,.1f}, "
        f"optimizer {1e3 * found.optimizer_seconds:,.1f}, communication {1e3 * found.communication_seconds:,.1f}, "
        f"of which {1e3 * found.exposed_seconds:,.1f} not hidden ({found.exposed_seconds / step:.0%} of the step)"
    )
    print(f"speed     {tokens / step:,.0f} tokens/s, {tokens / step / gpus:,.0f} on each GPU")
    budget = recipe.budget
    wanted = budget.tokens or (budget.steps and budget.steps * tokens)
    named, seconds = "budget    ", 60 * (budget.minutes or 0)
    if budget.epochs is not None:
        print(f"budget    {budget.epochs:g} epochs, as long as the data is: --tokens plans for a number")
        named, wanted = "          of each ", 10**9
    if wanted:
        named, seconds = f"{named}{wanted:,} tokens: {-(-wanted // tokens):,} steps, ", -(-wanted // tokens) * step
    hours = seconds * gpus / 3600
    cost = f", ${hours * price:,.2f}" if price is not None else ""
    print(f"{named}{seconds / 3600:,.2f} hours, {hours:,.1f} GPU hours{cost}")
    print(f"rate      {rate.source}")
    print(f"data      {machine.source}")
    if gpus > 1:
        print(
            f"links     {found.link_speed / 1e9:,.1f} GB/s: {LINK_EFFICIENCY:.0%} of the slower of node and network, "
            "ASSUMED; rings without latency"
        )
        muon = "each GPU does its share of Muon's matrices, ASSUMED" if found.setup.shard else "each GPU repeats Muon"
        hidden = "the whole pass" if found.setup.shard else "the backward pass"
        print(f"overlap   communication hides behind {hidden}, ASSUMED; {muon}")


def _print_forecast(found: "Plan", recipe: "Recipe") -> None:
    """Print what the run should reach, and stand at on the way, beside the reference where there is one."""
    from engine import laws
    from train.optimizer import rate_factor

    budget, text = recipe.budget, recipe.data.source
    epoch = laws.EPOCHS.get(text)
    tokens = budget.tokens or (budget.steps or 0) * recipe.tokens_per_step
    if budget.minutes is not None:
        tokens = int(60 * budget.minutes * recipe.tokens_per_step / found.step_seconds)
    elif budget.epochs is not None and epoch is not None:
        tokens = int(budget.epochs * epoch)
        print(f"epochs    {budget.epochs:g} x {epoch / 1e6:,.0f}M tokens of {text}, ASSUMED")
    if laws.forecast(recipe.model, tokens, text) is None:
        print(f"forecast  none for {tokens:,} tokens of {text}: measured were {', '.join(laws.LOSSES)}")
    for share in (0.01, 0.1, 1.0):
        rate, repeated = rate_factor(recipe.schedule, share), epoch or math.inf
        if at := laws.forecast(recipe.model, share * tokens, text, epoch=repeated, rate=rate):
            millions = share * tokens / 1e6
            read = f"{millions:,.0f}" if millions >= 1000 else f"{millions:.4g}"
            print(f"forecast  {at} after {read}M tokens, {share:.0%} of the run")
    if reference := laws.REFERENCES.get(recipe.name):
        print(
            f"reference {reference.bits_per_byte:.3f} bits per byte: loss {reference.loss:g} per token at "
            f"{reference.bytes_per_token:g} bytes per token, ASSUMED"
        )
