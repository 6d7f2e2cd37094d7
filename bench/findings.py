"""What sweeps have found: their valleys, the batch law and the forecast, as laws.json and as pictures beside it."""

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import fits
from bench.harness import Figures
from engine.config import PRESETS
from engine.disk import write_atomically
from engine.laws import Law, as_fresh

Points = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]

# What may be meant by the size of a model: the one that predicts the largest runs best is taken.
SIZES = {
    "blocks": ("block_parameters",),
    "blocks and head": ("block_parameters", "head_parameters"),
    "all": ("parameters",),
}
# Up to this many more bits per byte, as a share, a larger batch costs nothing that matters.
WITHIN = 0.01
# Floors, in bits per byte, which the runs hardly tell apart: engine/laws.py has one of them. Where none is named, it is
# the first.
FLOORS = (0.0, 0.1, 0.2, 0.35)
# How often runs are drawn anew, to see how the forecast varies.
RESAMPLES = 100
# What is foretold by it, for the spread of far forecasts: presets, and fresh tokens as good as theirs, in millions.
FORETOLD = {"tiny": 455 * 5.3, "large": 7000.0}
# The least steps before the loss of a run's course says something of another run's.
COURSE_STEPS = 50


@dataclass(frozen=True)
class Panel:
    """A part of a picture: by label, points, lines and minima with the same colour."""

    title: str
    x: str
    y: str
    points: dict[str, Points] = field(default_factory=dict)
    lines: dict[str, Points] = field(default_factory=dict)
    minima: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, label: str, runs: Iterable[Figures], lowest: fits.Valley) -> None:
        """Add a valley: the mean loss over seeds at each rate, and its minimum."""
        at = {rate: column(its, "bits_per_byte").mean() for (rate,), its in grouped(runs, "rate").items()}
        self.lines[label] = self.points[label] = (list(at), list(at.values()))
        if lowest.inside:
            self.minima[label] = (lowest.rate, lowest.loss)


def summarise(runs: Sequence[Figures], out: Path) -> Figures:
    """Write what these runs say to `out`, and a picture beside it for each kind of sweep among them. Return it."""
    commits = sorted({run["versions"]["commit"] for run in runs})
    found: Figures = {"commits": commits, "noise": noise_of(runs) or fits.NOISE}
    for kind, find in {"transfer": valleys, "batch": batches, "size": forecasts}.items():
        if mine := [run for run in runs if run["kind"] == kind]:
            found[kind], panels = find(mine, found["noise"])
            draw(panels, out.with_name(f"{out.stem}-{kind}.png"))
    write_atomically(out, json.dumps(found, indent=1) + "\n")
    return found


def in_words(found: Figures) -> Iterator[str]:
    """Yield what was found, in a line each."""
    for each in found.get("transfer", {}).get("spreads", ()):
        inside = f"{each['inside']} of {each['shapes']} minima inside, within a factor of {each['spread'] or 1:.2f}"
        yield f"{each['data']}, {each['tokens']:,} tokens, rates varied: {each['varied']}: {inside}"
    for varied, law in found.get("transfer", {}).get("corrections", {}).items():
        yield f"left in the best rates ({varied}): {powers_in_words(law)}"
    if batch := found.get("batch"):
        yield f"best rate of matrices: {powers_in_words(batch['rate'])}"
        for each in batch["largest_within_1%"]:
            yield f"{each['data']}, {each['tokens']:,} tokens: up to {each['batch']:,.0f} a step within 1% of the best"
    if size := found.get("size"):
        law, error = size["laws"][size["size"]], size["error_of_the_largest"][size["size"]]
        terms = "({of_weights:.3g} / N^{weights_power:.2f} + {of_tokens:.3g} / D^{tokens_power:.2f})^{power:.2f}"
        yield f"{size['text']}: {terms.format(**law)}, in millions (N: {size['size']}); the largest within {error:.1%}"
        for data, each in size["texts"].items():
            yield f"{data}: {each['factor']:.3f} times that, within {each['scatter']:.1%}"
        for each in size["repeats"]:
            terms = "{data}: {epochs:.1f} epochs with {tokens_per_weight:.2f} tokens for a weight"
            yield f"{terms.format(**each)}: as if new for {each['repeats']:.1f} more in the end"
        for name, each in size["far"].items():
            yield f"{name}: {each['bits_per_byte']:.3f}, with a deviation of {each['deviation']:.0%}"


def powers_in_words(law: Figures) -> str:
    powers = ((name, each) for name, each in law.items() if name != "constant")
    return ", ".join(
        f"{name}^{each['power']:.2f} ({each['interval'][0]:.2f} to {each['interval'][1]:.2f})" for name, each in powers
    )


def grouped(runs: Iterable[Figures], *names: str) -> dict[tuple[Any, ...], list[Figures]]:
    """Return runs by the values of these fields, in their order."""
    found: dict[tuple[Any, ...], list[Figures]] = {}
    for run in sorted(runs, key=lambda run: tuple(run[name] for name in names)):
        found.setdefault(tuple(run[name] for name in names), []).append(run)
    return found


def column(runs: Iterable[Figures], *names: str) -> np.ndarray:
    """Return the sum of these fields of each run."""
    return np.array([sum(run[name] for name in names) for run in runs], float)


def noise_of(runs: Iterable[Figures]) -> float | None:
    """Return the deviation between runs that differ in their seed alone, as a share of the loss; None without such."""
    same = grouped(runs, "kind", "varied", "data", "name", "width", "blocks", "tokens_per_step", "tokens", "rate")
    logs = [np.log(column(group, "bits_per_byte")) for group in same.values() if len(group) > 1]
    return float(np.sqrt(np.mean([each.var(ddof=1) for each in logs]))) if logs else None


def valleys(runs: Sequence[Figures], noise: float) -> tuple[Figures, list[Panel]]:
    """Find the best multiple of the law's rates for each shape: at a law that transfers it is the same for all."""
    found, spreads, panels = [], [], []
    for (varied, data, tokens), mine in grouped(runs, "varied", "data", "budget").items():
        shapes = {}
        for (width, blocks), group in grouped(mine, "width", "blocks").items():
            rates, losses = column(group, "rate"), column(group, "bits_per_byte")
            lowest = shapes[width, blocks] = fits.valley(rates, losses, noise)
            # What it costs to take the law's rates as they are.
            cost = float(losses[rates == 1].mean() / lowest.loss - 1) if 1 in rates else None
            about = {"varied": varied, "data": data, "tokens": tokens, "width": width, "blocks": blocks}
            found.append({**about, **asdict(lowest), "at_the_law": cost})
        best = [each.rate for each in shapes.values() if each.inside]
        spread = max(best) / min(best) if best else None
        about = {"varied": varied, "data": data, "tokens": tokens, "shapes": len(shapes)}
        spreads.append({**about, "inside": len(best), "spread": spread})
        # A panel for the widths of each depth, and one for the depths of each width, where there are several.
        for fixed, other, unit in (("blocks", "width", "wide"), ("width", "blocks", "blocks")):
            for (value,), group in grouped(mine, fixed).items():
                if len(lines := grouped(group, other)) < 2:
                    continue
                x = "all rates / the law's" if varied == "all" else f"{varied} / the law's"
                panels.append(panel := Panel(f"{data}, {tokens:,} tokens, {fixed} {value}", x, "bits per byte"))
                for (size,), line in lines.items():
                    lowest = shapes[(size, value) if other == "width" else (value, size)]
                    panel.add(f"{size} {unit}", line, lowest)
    inside = grouped((each for each in found if each["error"]), "varied")
    corrections = {varied: rate_law(its, "rate", ("width", "blocks", "tokens")) for (varied,), its in inside.items()}
    return {"spreads": spreads, "corrections": corrections, "valleys": found}, panels


def rate_law(found: Sequence[Figures], rate: str, names: Sequence[str]) -> Figures:
    """Return the powers of the best rate over those of these fields that vary, with two standard errors about them."""
    varied = [name for name in names if len({each[name] for each in found}) > 1]
    xs = [column(found, name) for name in varied]
    # Width and depth, say, have to vary each by itself.
    if np.linalg.matrix_rank(np.stack([np.ones(len(found)), *map(np.log, xs)])) <= len(varied):
        return {}
    powers, errors = fits.powers(column(found, rate), *xs, errors=column(found, "error"))
    intervals = [[power - 2 * error, power + 2 * error] for power, error in zip(powers, errors, strict=True)]
    each = zip(varied, powers[1:].tolist(), intervals[1:], strict=True)
    return {"constant": float(np.exp(powers[0])), **{name: {"power": p, "interval": i} for name, p, i in each}}


def batches(runs: Sequence[Figures], noise: float) -> tuple[Figures, list[Panel]]:
    """Find the best matrix rate of each batch and the loss there: their powers, and the largest cheap batch."""
    found, panels = [], []
    rate_panel = Panel("best rate", "tokens in a step", "rate of matrices")
    cost_panel = Panel("cost of a batch", "tokens in a step", "bits per byte / the best batch's")
    largest: list[Figures] = []
    for (data, tokens), mine in grouped(runs, "data", "budget").items():
        panel = Panel(f"{data}, {tokens:,} tokens", "all rates / the law's", "bits per byte")
        lowest: dict[int, fits.Valley] = {}
        for (batch,), group in grouped(mine, "tokens_per_step").items():
            lowest[batch] = fits.valley(column(group, "rate"), column(group, "bits_per_byte"), noise)
            panel.add(f"{batch:,} a step", group, lowest[batch])
            unit = group[0]["rates"]["matrix_rate"] / group[0]["rate"]
            about = {"data": data, "tokens": tokens, "batch": batch, "matrix_rate": unit * lowest[batch].rate}
            found.append({**about, **asdict(lowest[batch])})
        panels.append(panel)
        label, sizes = f"{data}, {tokens:,}", np.array(list(lowest), float)
        losses = np.array([each.loss for each in lowest.values()])
        cost_panel.lines[label] = cost_panel.points[label] = (sizes, losses / losses.min())
        if (last := crossing(sizes, losses / losses.min())) is not None:
            largest.append({"data": data, "tokens": tokens, "batch": last, "loss": losses.min()})
            cost_panel.minima[label] = (last, 1 + WITHIN)
        inside = [each for each in found[-len(lowest) :] if each["error"]]
        rate_panel.points[label] = (column(inside, "batch"), column(inside, "matrix_rate"))
    inside = [each for each in found if each["error"]]
    rate = rate_law(inside, "matrix_rate", ("batch", "tokens"))
    for (data, tokens), mine in grouped(found, "data", "tokens").items():
        if "batch" in rate:
            ends = np.array([mine[0]["batch"], mine[-1]["batch"]], float)
            scale = rate["constant"] * tokens ** (rate["tokens"]["power"] if "tokens" in rate else 0)
            rate_panel.lines[f"{data}, {tokens:,}"] = (ends, scale * ends ** rate["batch"]["power"])
    return {"rate": rate, "largest_within_1%": largest, "valleys": found}, [*panels, rate_panel, cost_panel]


def crossing(sizes: np.ndarray, costs: np.ndarray) -> float | None:
    """Return the batch, past the best one, at which the cost reaches 1 + WITHIN; None where it never does."""
    for n in range(int(costs.argmin()), len(sizes) - 1):
        if costs[n] <= 1 + WITHIN < costs[n + 1]:
            return float(np.exp(np.interp(1 + WITHIN, costs[n : n + 2], np.log(sizes[n : n + 2]))))
    return None


def forecasts(runs: Sequence[Figures], noise: float) -> tuple[Figures, list[Panel]]:
    """Fit bits per byte over size and tokens, with what the fit of small runs makes of the largest.

    The law is that of the text with the most runs; others have it times a factor.
    """
    once = [run for run in runs if run["tokens"] <= run["unique_tokens"]]
    groups = {data: its for (data,), its in grouped(once, "data").items()}
    text = max(groups, key=lambda data: len(groups[data]))
    mine = groups[text]
    losses, tokens = column(mine, "bits_per_byte"), column(mine, "tokens") / 1e6
    # What has taken the most work is held out, to see how far the others tell it.
    last = np.argsort(column(mine, "parameters") * tokens)[-max(1, len(mine) // 7) :]
    meant = {name: size_of(mine, name) for name in SIZES}
    of_others = {name: fits.held_out(sizes, tokens, losses, last) for name, sizes in meant.items()}
    chosen = min(of_others, key=lambda name: of_others[name][1])
    sizes, others = meant[chosen], of_others[chosen][0]
    own = fits.forecast(sizes, tokens, losses)
    found = {
        "text": text,
        "runs": len(mine),
        "size": chosen,  # in millions of weights; tokens are in millions
        "weights": [sizes.min(), sizes.max()],
        "tokens": [tokens.min(), tokens.max()],
        "laws": {name: asdict(fits.forecast(its, tokens, losses)) for name, its in meant.items()},
        "error_of_the_largest": {name: error for name, (_, error) in of_others.items()},
        "scatter": float(np.std(np.log(fits.along(own, sizes, tokens) / losses))),
        "floors": {str(floor): with_floor(sizes, tokens, losses, last, floor) for floor in FLOORS},
        "far": {name: far(meant, tokens, losses, name) for name in FORETOLD},
        "texts": {data: factor(its, size_of(its, chosen), own) for data, its in groups.items() if data != text},
        "course": course(mine, sizes, own),
    }
    factors = {text: 1.0, **{data: each["factor"] for data, each in found["texts"].items()}}
    found["repeats"] = [
        {
            "data": run["data"],
            "epochs": run["tokens"] / run["unique_tokens"],
            "tokens_per_weight": run["unique_tokens"] / 1e6 / size_of([run], chosen)[0],
            "repeats": repeats(run, float(size_of([run], chosen)[0]), factors[run["data"]], own),
        }
        for run in runs
        if run["tokens"] > run["unique_tokens"] and run["data"] in factors
    ]
    panel = Panel(f"{text}: the law, and runs", "millions of tokens", "bits per byte")
    for size in np.unique(sizes):
        label, its = f"{size:.2f}M weights", sizes == size
        reach = np.geomspace(tokens[its].min(), tokens[its].max(), 30)
        panel.points[label], panel.lines[label] = (tokens[its], losses[its]), (reach, fits.along(own, size, reach))
    missed = Panel(f"{text}: the largest, from the others", "weights x tokens", "foretold / measured")
    work, held = sizes * tokens * 1e12, np.isin(np.arange(len(mine)), last)
    ratio = fits.along(others, sizes, tokens) / losses
    missed.points.update({"fitted": (work[~held], ratio[~held]), "held out": (work[held], ratio[held])})
    return found, [panel, missed]


def size_of(runs: Sequence[Figures], meaning: str) -> np.ndarray:
    return column(runs, *SIZES[meaning]) / 1e6


def repeats(run: Figures, size: float, times: float, law: Law) -> float:
    """Return for how many times a run's tokens have counted as new, in the end, that it has reached what it has."""
    tried = np.geomspace(0.05, 100, 2000)
    worth = np.vectorize(as_fresh)(run["tokens"] / 1e6, run["unique_tokens"] / 1e6, tried)
    return float(tried[np.abs(times * fits.along(law, size, worth) / run["bits_per_byte"] - 1).argmin()])


def with_floor(sizes: np.ndarray, tokens: np.ndarray, losses: np.ndarray, last: np.ndarray, floor: float) -> Figures:
    """Return the law with a floor, how it meets the runs, and how that of the others meets the last ones."""
    law = fits.forecast(sizes, tokens, losses, floor)
    scatter = float(np.std(np.log(fits.along(law, sizes, tokens) / losses)))
    error = fits.held_out(sizes, tokens, losses, last, floor)[1]
    return {**asdict(law), "scatter": scatter, "error_of_the_largest": error}


def far(meant: Mapping[str, np.ndarray], tokens: np.ndarray, losses: np.ndarray, preset: str) -> Figures:
    """Return what a preset would reach with this text: the median and the deviation of the logarithm, over draws.

    A draw is of runs, of what the size of a model means, and of the floor.
    """
    model, random = PRESETS[preset].model, np.random.default_rng(0)
    head = model.outputs * model.width
    sizes = dict(zip(SIZES, (model.matmul_parameters - head, model.matmul_parameters, model.parameters), strict=True))
    logs = []
    for _ in range(RESAMPLES):
        name, floor = random.choice(list(meant)), random.choice(FLOORS)
        pick = random.integers(len(tokens), size=len(tokens))
        law = fits.forecast(meant[name][pick], tokens[pick], losses[pick], float(floor))
        logs.append(np.log(law(sizes[name] / 1e6, FORETOLD[preset])))
    return {"bits_per_byte": float(np.exp(np.median(logs))), "deviation": float(np.std(logs))}


def factor(runs: Sequence[Figures], sizes: np.ndarray, law: Law) -> Figures:
    """Return by what factor runs on another text are above a law, and how they scatter about that."""
    logs = np.log(column(runs, "bits_per_byte") / fits.along(law, sizes, column(runs, "tokens") / 1e6))
    return {"runs": len(runs), "factor": float(np.exp(logs.mean())), "scatter": float(logs.std())}


def course(runs: Sequence[Figures], sizes: np.ndarray, own: Law) -> Figures:
    """Return how far the training loss within a run is above what the law says of a run that ends there.

    By the share of the run: the mean ratio, its deviation, and of how many runs.
    """
    ratios: dict[float, list[float]] = {}
    for run, size in zip(runs, sizes, strict=True):
        for share, loss in run["training"]:
            if share * run["tokens"] >= COURSE_STEPS * run["tokens_per_step"] and run["tokens"] <= run["unique_tokens"]:
                ratios.setdefault(share, []).append(loss / own(size, share * run["tokens"] / 1e6))
    return {str(s): [float(np.mean(each)), float(np.std(each)), len(each)] for s, each in sorted(ratios.items())}


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels in rows of up to four."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = (1 + 4.2 * columns, 0.5 + 3.8 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        if panel is None:
            axes.axis("off")
            continue
        labels = list({**panel.points, **panel.lines})
        for label, shade in zip(labels, pyplot.get_cmap("plasma")(np.linspace(0.05, 0.85, len(labels))), strict=True):
            if label in panel.lines:
                axes.plot(*panel.lines[label], color=shade, lw=1.2)
            if label in panel.points:
                axes.plot(*panel.points[label], "o", ms=4, color=shade, label=label)
            if label in panel.minima:
                axes.plot(*panel.minima[label], "*", ms=13, mec="black", mew=0.6, color=shade, zorder=5)
        ticks = sorted({float(x) for xs, _ in panel.points.values() for x in xs})
        if len(ticks) < 10 and panel.x != "weights x tokens":
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:,.0f}" if tick > 99 else f"{tick:.3g}" for tick in ticks])
        else:
            axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")
        if panel.y == "rate of matrices":
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(picture := io.BytesIO(), dpi=110)
    write_atomically(path, picture.getvalue())
    pyplot.close(figure)
    print(f"drawn in {path}")
