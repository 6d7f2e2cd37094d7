"""gpt info"""

from cli.options import RunArgument


def info(path: RunArgument) -> None:
    """Say what a run is: model, data, progress, checkpoints.

    Example: gpt info runs/nano
    """
    from rich.console import Console
    from rich.table import Table

    from engine import checkpoint
    from engine.config import IMPORTED
    from engine.run import Run
    from train.tracking import evaluation_parts, read_metrics

    run = Run(path)
    config, recipe = run.read_config(), run.read_recipe()
    model = recipe.model
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("run", f"{path} ({recipe.name})")
    table.add_row(
        "model", f"{model.parameters:,} parameters, {model.blocks} blocks, {model.width} wide, {model.heads} heads"
    )
    table.add_row("context", f"{model.context} tokens, vocabulary {model.vocab_size:,}")
    table.add_row("data", recipe.data.source)
    if recipe.base is not None:
        table.add_row("base", f"{recipe.base}, step {recipe.base_step}")
    if recipe.data.source != IMPORTED:
        budget = next(f"{value:,} {name}" for name, value in vars(recipe.budget).items() if value is not None)
        table.add_row("budget", budget)
    trained = [line for line in read_metrics(run.metrics) if "loss" in line]
    if trained:
        last = trained[-1]
        table.add_row(
            "trained", f"{last['step']:,} steps, {last['tokens']:,} tokens, {last['seconds'] / 60:.1f} minutes"
        )
    best = checkpoint.best(run.checkpoints)
    for found in checkpoint.checkpoints(run.checkpoints):
        evaluation = found.evaluation() or {}
        measured = ", ".join(evaluation_parts(evaluation)) if evaluation else "not evaluated"
        try:
            found.verify()
            state = "whole"
        except checkpoint.DamagedCheckpointError as damage:
            state = f"DAMAGED ({damage})"
        table.add_row("checkpoint", f"{found.path.name}: {measured}, {state}{', best' if found == best else ''}")
    for name, value in config.get("versions", {}).items():
        table.add_row(name, str(value))
    Console(soft_wrap=True, highlight=False).print(table)
