"""The report of a run, for a person to look at: loss.png and report.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import Recipe, settings
from engine.run import Run, versions
from train.text_metrics import Estimate
from train.tracking import evaluation_parts, read_metrics

EVALUATIONS = "\n## Evaluation\n\n"


def write_report(run: Run, recipe: Recipe, machine: str, peak_memory: int) -> None:
    """Write report.md and, where matplotlib is installed, loss.png, from the run's metrics."""
    metrics = read_metrics(run.metrics)
    last: dict[str, Any] = next((line for line in reversed(metrics) if "loss" in line), {})
    lines = [f"# {recipe.name}: {run.path.name}", ""]
    if final := next((line for line in reversed(metrics) if "validation_loss" in line), None):
        parts = ", ".join(f"**{part}**" for part in evaluation_parts(final, "validation_"))
        tokens, step = final["validation_tokens"], final["step"]
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
    run.report.write_text("\n".join(lines))
    write_evaluations(run)


def write_evaluations(run: Run) -> None:
    """Put what `gpt evaluate` has measured so far at the end of the report."""
    sections = []
    for path in sorted(run.path.glob("evaluation-*.json")):
        result = json.loads(path.read_text(), object_hook=lambda found: Estimate(**found) if "low" in found else found)
        heading, *rows = evaluation_table(result)
        sections += [f"### {result['data']}", "", *(f"- {note}" for note in evaluation_notes(result)), ""]
        sections += ["".join(f"| {cell} " for cell in row) + "|" for row in (heading, ["---"] * len(heading), *rows)]
        sections += ["", f"The texts are in {path.name}.", ""]
    report = run.report.read_text() if run.report.exists() else f"# {run.path.name}\n"
    if sections:
        run.report.write_text(report.partition(EVALUATIONS)[0] + EVALUATIONS + "\n".join(sections))


def evaluation_table(result: Mapping[str, Any]) -> list[list[str]]:
    """Return a heading and a row per metric, with a column per run, and one for the references where there were any."""
    columns = {f"{Path(each['run']).name}, step {each['step']:,}": each["measures"] for each in result["runs"]}
    columns |= {"reference": result["reference"]} if "reference" in result else {}
    names = result["runs"][0]["measures"]
    rows = [[name.replace("_", " "), *(str(own.get(name, "")) for own in columns.values())] for name in names]
    return [["", *columns], *rows]


def evaluation_notes(result: Mapping[str, Any]) -> list[str]:
    """Say how it was evaluated, and who wins."""
    return [*result["notes"]] + [
        f"By {name.replace('_', ' ')} {result['runs'][0]['run']} wins {own['wins']:,}, ties {own['ties']:,} and loses "
        f"{own['losses']:,}: win rate {own['win_rate']}, p = {own['p']:.2g} by a two-sided sign test."
        for name, own in result.get("comparison", {}).items()
    ]


def plot_loss(metrics: list[dict[str, Any]], path: Path) -> bool:
    """Draw training and validation loss over tokens. False, and no picture, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A loss that was not finite is null.
    trained = [line for line in metrics if line.get("loss") is not None]
    validated = [line for line in metrics if line.get("validation_loss") is not None]
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
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
