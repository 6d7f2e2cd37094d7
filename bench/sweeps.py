"""Many small training runs by the trainer itself, for what is measured on all of them: laws, and what helped.

    python -m bench.sweeps KIND --data PREPARED --out FILE.jsonl      (KIND: helped, transfer, batch or size)
    python -m bench.sweeps fit FILE.jsonl... --out laws.json          (see bench/fits.py)

A run is a line of FILE, written when it ends; what stands there already, with the same settings on the same data, is
left out, so that the same command goes on after an interruption. PREPARED is made once, by `gpt data prepare`. Each
run is a process of its own, with one thread: one that crashes costs itself alone. The order is such that a sweep that
is cut short still says something: fewer tokens first, rates from the middle outward, then further seeds.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.findings import in_words, summarise
from bench.harness import Figures, ending_together
from bench.tuning import PROCESSES, in_processes
from engine import laws, runtime
from engine.config import BudgetConfig, OptimizerConfig, Recipe, override, override_text, preset, settings
from engine.disk import append
from engine.errors import InputError
from engine.run import Run, versions
from engine.tokenizer import Tokenizer
from train.data.shards import TokenShards
from train.pretrain import pretrain

# Those of what pretraining trains.
RATES = tuple(
    each.name
    for each in dataclasses.fields(OptimizerConfig)
    if each.name.endswith("_rate") and each.name not in ("critic_rate", "adapter_rate")
)
HEAD_DIM = 32
# The shares of a run at which its training loss is noted: the mean over the fifth before each.
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LONGEST = 24 * 3600  # seconds that a run may take
STEPS_OF_TWO = "0.25,0.5,1,2,4"
# What each kind of sweep varies, unless options say otherwise: shapes are WIDTHxBLOCKS, batches are in sequences (or
# law: those of engine/laws.py).
KINDS = {
    "helped": {"shapes": "128x4", "batches": "8", "rates": "1", "tokens": "598016,2400256", "seeds": "3"},
    "transfer": {
        "shapes": "64x4,96x4,128x4,192x4,96x2,96x8", "batches": "8", "rates": STEPS_OF_TWO,
        "tokens": "300000,1200000", "seeds": "1",
    },
    "batch": {
        "shapes": "128x4", "batches": "4,8,16,32,64,128", "rates": STEPS_OF_TWO, "tokens": "600000,2400000",
        "seeds": "1",
    },
    "size": {
        "shapes": "64x2,96x3,128x4,192x6", "batches": "law", "rates": "1",
        "tokens": "150000,400000,1000000,2500000,6000000", "seeds": "1",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A run that is to be made: what its line says of it beside its result, and its recipe."""

    about: Figures
    recipe: Recipe
    data: str  # a hash of its token files

    @property
    def settings(self) -> Figures:
        """Return the settings that are not at their defaults: one that has come since changes nothing."""
        defaults = {name: value for name, value, _ in settings(Recipe)}
        own = {name: value for name, value, _ in settings(self.recipe) if value != defaults[name]}
        # The same data in another folder is the same data; and what rates are does not depend on where they are from.
        return {name: value for name, value in own.items() if name not in ("name", "data.source", "optimizer.origin")}

    @property
    def key(self) -> str:
        """Return what tells runs apart."""
        return hashlib.sha256(json.dumps([self.settings, self.data], sort_keys=True).encode()).hexdigest()[:16]


def tasks(kind: str, given: argparse.Namespace) -> list[Task]:
    """Return the runs of a sweep in the order in which they are to be made."""
    vocabulary, shards = Tokenizer.load(given.data).vocab_size, TokenShards(given.data, "train")
    fingerprint = hashlib.sha256(f"{shards.fingerprint} {shards.tokens}".encode()).hexdigest()
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes.split(",")]
    budgets = [int(float(each)) for each in given.tokens.split(",")]
    context = preset("nano").model.context
    batches = [
        {tokens: laws.batch(tokens, context) if each == "law" else int(each) for tokens in budgets}
        for each in given.batches.split(",")
    ]
    rates = sorted(map(float, given.rates.split(",")), key=lambda rate: abs(math.log(rate)))
    changes = read_changes(given.change) if kind == "helped" else {kind: []}
    varied = RATES if given.vary == "all" else given.vary.split(",")
    if unknown := set(varied) - set(RATES):
        raise InputError(f"--vary names {unknown.pop()}; it must be all, or of {', '.join(RATES)}")
    found = []
    for tokens, seed, rate, (width, blocks), batch, (name, change) in product(
        sorted(budgets), range(given.seeds), rates, shapes, batches, changes.items()
    ):
        shape: dict[str, Any] = {
            "width": width,
            "heads": max(1, width // HEAD_DIM),
            "blocks": blocks,
        }
        nano = preset("nano")
        base = dataclasses.replace(nano, model=dataclasses.replace(nano.model, vocab_size=vocabulary, **shape))
        base = override(base, "loop.batch", batch[tokens])
        base = dataclasses.replace(base, budget=BudgetConfig(tokens=tokens), precision=given.precision)
        if kind != "helped":
            rates_of = laws.optimizer(base.model, base.tokens_per_step, tokens)
            base = dataclasses.replace(base, optimizer=rates_of)
        recipe = override_text(base, *given.set, *change)
        optimizer = {each: rate * getattr(recipe.optimizer, each) for each in varied}
        recipe = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, **optimizer))
        for setting, value in {
            "data.source": str(given.data.resolve()),
            "data.fallback": None,
            "data.evaluation_tokens": 10_000,
            "data.final_evaluation_tokens": given.held_out,
            "loop.seed": seed,
            "loop.samples": 0,
            "loop.keep": 1,
            "loop.evaluate_every": max(1, math.ceil(tokens / recipe.tokens_per_step / 4)),
        }.items():
            recipe = override(recipe, setting, value)
        about = {"kind": kind, "name": name, "varied": given.vary, "rate": rate, "seed": seed, "data": given.data.name}
        found.append(Task({**about, "budget": tokens, "unique_tokens": shards.tokens}, recipe, fingerprint))
    return found


def read_changes(given: Sequence[str]) -> dict[str, list[str]]:
    """Return the settings of each change, by name: of texts NAME=setting=value,... and files {NAME: [setting=value]}.

    The first, base, changes nothing: what the others are compared with.
    """
    found: dict[str, list[str]] = {"base": []}
    for text in given:
        name, equals, change = text.partition("=")
        found |= {name: change.split(",")} if equals else json.loads(Path(text).read_text())
    return found


class Collector:
    """A console that keeps the numbers of a run, and tells nobody."""

    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []

    def say(self, message: str) -> None: ...

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.lines.append(metrics)

    def close(self) -> None: ...


def train(folder: str, task: Task) -> Figures:
    """Train in this process, with one thread. Return the line of the run; nothing of it is left behind."""
    torch.set_num_threads(1)
    console = Collector()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        run = Run(Path(place) / "run")
        run.path.mkdir()
        machine = runtime.choose("cpu", task.recipe.precision)
        outcome = pretrain(task.recipe, run, machine, console)
    steps = [line for line in console.lines if "loss" in line]
    curve = [line for line in console.lines if "validation_loss" in line]
    total, model, optimizer = steps[-1]["tokens"], task.recipe.model, task.recipe.optimizer
    learnt: dict[float, float] = {}
    for share in SHARES:
        near = [line["bits_per_byte"] for line in steps if 0.8 * share < line["tokens"] / total <= share]
        learnt |= {share: round(statistics.fmean(near), 4)} if near else {}
    return {
        **task.about,
        "width": model.width,
        "blocks": model.blocks,
        "heads": model.heads,
        "vocabulary": model.vocab_size,
        "parameters": model.parameters,
        "block_parameters": model.matmul_parameters - model.outputs * model.width,
        "head_parameters": model.outputs * model.width,
        "tokens": total,
        "tokens_per_step": task.recipe.tokens_per_step,
        "rates": {each: getattr(optimizer, each) for each in RATES},
        "precision": machine.precision,
        **{name: outcome.evaluation[name] for name in ("bits_per_byte", "loss")},
        "validation": [[line["tokens"], round(line["validation_bits_per_byte"], 4)] for line in curve],
        "training": list(learnt.items()),
        "tokens_per_second": round(statistics.median(line["tokens_per_second"] for line in steps)),
        "seconds": round(steps[-1]["seconds"], 1),
        "settings": task.settings,
        "key": task.key,
        "versions": versions(),
    }


def read(files: Sequence[Path]) -> list[Figures]:
    """Return the lines of files; of a run that diverged a line has the `reason`, and no `bits_per_byte`."""
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines() if line]


def sweep(wanted: Sequence[Task], out: Path, workers: int) -> Iterator[Figures]:
    """Make the runs that `out` does not hold, several at a time. Yield the line of each, or the `reason` for none.

    What another sweep has made for itself is written once more, as a line of this one.
    """
    known: dict[str, list[Figures]] = {}
    for line in read([out]):
        known.setdefault(line["key"], []).append(line)
    for task in (task for task in wanted if task.key in known):
        if not any(task.about.items() <= line.items() for line in known[task.key]):
            append(out, json.dumps(known[task.key][0] | task.about) + "\n")
    left = [task for task in wanted if task.key not in known]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        try:
            work = partial(train, folder)
            running = {pool.submit(lambda task: next(in_processes(work, [task], LONGEST)), each): each for each in left}
            for done in as_completed(running):
                task, line = running[done], done.result()
                if "reason" not in line or line["reason"].startswith("TrainingError"):
                    line = line if "key" in line else {**task.about, "key": task.key, **line}
                    append(out, json.dumps(line) + "\n")
                yield line
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def helped(lines: Sequence[Figures]) -> Iterator[str]:
    """Yield a table of what helped: means and deviations over seeds, and whether a mean falls by two deviations.

    These two are of a single run, of the change's and the base's together.
    """
    groups: dict[tuple[str, int, str], list[Figures]] = {}
    for line in (line for line in lines if line["kind"] == "helped"):
        groups.setdefault((line["data"], line["budget"], line["name"]), []).append(line)
    if groups:
        yield "| data, tokens | change | bits per byte | difference | beats two deviations | tokens/s | seeds |"
        yield "|---|---|---|---|---|---|---|"
    for (data, tokens, name), runs in sorted(groups.items(), key=lambda item: (item[0][:2], item[0][2] != "base")):
        base = groups.get((data, tokens, "base"), [])
        own, same = (np.array([run["bits_per_byte"] for run in each] or [math.nan]) for each in (runs, base))
        # One run alone has no deviation.
        deviations = [each.std(ddof=1) if len(each) > 1 else math.nan for each in (own, same)]
        spread, gain = np.sqrt(np.mean(np.square(deviations))), own.mean() - same.mean()
        verdict = "-" if name == "base" or np.isnan(spread) else "yes" if gain < -2 * spread else "no"
        speed = statistics.median(run["tokens_per_second"] for run in runs)
        yield (
            f"| {data}, {tokens:,} | {name} | {own.mean():.4f} ± {deviations[0]:.4f} | {gain:+.4f} | {verdict} "
            f"| {speed:,.0f} | {len(own)} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "bench.sweeps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, defaults in KINDS.items():
        own = kinds.add_parser(kind)
        own.add_argument("--data", type=Path, required=True, help="a folder of `gpt data prepare`")
        own.add_argument("--out", type=Path, required=True, help="a file of JSON lines")
        own.add_argument("--workers", type=int, default=2, help="runs at a time, each with one thread")
        own.add_argument("--precision", default="fp32", help="fp32 or bf16")
        own.add_argument("--held-out", type=int, default=10**15, help="tokens to evaluate on; all unless given")
        own.add_argument("--vary", default="all", help="the rates that --rates multiply, with commas between")
        own.add_argument("--set", action="append", default=[], help="setting=value, of all runs")
        for name, default in defaults.items():
            kind_of = int if name == "seeds" else str
            own.add_argument(f"--{name}", type=kind_of, default=kind_of(default), help=f"{default} unless given")
        if kind == "helped":
            own.add_argument("--change", action="append", default=[], help="NAME=setting=value,... or a JSON file")
    fit = kinds.add_parser("fit")
    fit.add_argument("files", nargs="+", type=Path)
    fit.add_argument("--out", type=Path, default=Path("laws.json"))
    given = parser.parse_args(arguments)
    try:
        if given.kind == "fit":
            runs = [line for line in read(given.files) if "bits_per_byte" in line]
            print("\n".join([*helped(runs), *in_words(summarise(runs, given.out))]))
            return 0
        wanted = tasks(given.kind, given)
        PROCESSES.set_forkserver_preload(["train.pretrain", "bench.tuning"])
        with ending_together():
            for number, line in enumerate(sweep(wanted, given.out, given.workers), 1):
                print(f"{number} of {len(wanted)}: {told(line)}", flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if given.kind == "helped":
        print("\n".join(helped([line for line in read([given.out]) if "bits_per_byte" in line])))
    return 0


def told(line: Figures) -> str:
    if "reason" in line:
        return line["reason"]
    shape = f"{line['width']}x{line['blocks']}, {line['tokens']:,} tokens by {line['tokens_per_step']:,}"
    result = f"{line['bits_per_byte']:.4f} bits per byte, {line['seconds']:.0f} s"
    return f"{line['name']}, {shape}, rate {line['rate']:g}, seed {line['seed']}: {result}"


if __name__ == "__main__":
    sys.exit(main())
