"""gpt bench-train"""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Device, Precision, Results

BATCHES = {"nano": 16, "tiny": 8, "large": 4}


def bench_train(
    preset: Annotated[str, typer.Argument(help="nano, tiny or large.")] = "nano",
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of one context each.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Instead of the preset's.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps to take the median of.")] = 10,
    compile: Annotated[bool, typer.Option("--compile", help="Also time torch.compile.")] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    out: Results = Path("bench/results"),
) -> None:
    """Time the training step against a plain PyTorch GPT of the same shape, in the same process.

    Example: gpt bench-train tiny --rounds 5
    """
    from rich.console import Console
    from rich.table import Table

    from bench.results import write_result
    from bench.training import bench_training
    from engine import config, runtime

    recipe = config.override(config.preset(preset), "loop.batch", batch or BATCHES[preset])
    title = f"training-{preset}"
    if context is not None:
        recipe, title = config.override(recipe, "model.context", context), f"{title}-{context}"
    machine = runtime.choose(device, precision)
    result = bench_training(recipe, machine, rounds=rounds, compile=compile)
    table = Table("variant", "tokens/s", "against plain", "of peak", "start-up", "peak memory")
    for name, figures in result["variants"].items():
        table.add_row(
            name,
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['against_plain']:.2f}x",
            f"{100 * figures['mfu']:.0f}%",
            f"{figures['start_up_seconds']:.1f} s",
            f"{figures['peak_memory_bytes'] / 2**20:,.0f} MiB",
        )
    console = Console(highlight=False)
    console.print(f"{preset}, batch {recipe.loop.batch} x {recipe.model.context}, {machine.describe()}")
    console.print(table)
    console.print(f"written to {write_result(title, machine, result, out)}")


def bench_quality(
    data: Annotated[str, typer.Argument(help="A folder made by `gpt data prepare`.")],
    minutes: Annotated[float, typer.Option(help="How long the plain trainer runs.")] = 2.75,
    batch: Annotated[int, typer.Option(min=1, help="Rows of one context each.")] = 16,
    rate: Annotated[float, typer.Option(help="Its learning rate.")] = 1e-3,
    device: Device = "auto",
) -> None:
    """What the plain trainer reaches on the same text in the same time: compare with `gpt train nano --minutes`.

    Example: gpt bench-quality data/tinystories --minutes 2.75
    """
    from bench.results import write_result
    from bench.training import train_plain
    from engine import config, runtime

    recipe = dataclasses.replace(config.override(config.preset("nano"), "loop.batch", batch), precision="fp32")
    machine = runtime.choose(device, "fp32")
    result = train_plain(recipe, data, machine, seconds=60 * minutes, rate=rate)
    trained, evaluation = result["trained"], result["evaluation"]
    print(
        f"plain: loss {evaluation['loss']:.4f}, {evaluation['bits_per_byte']:.4f} bits per byte "
        f"after {trained['tokens']:,} tokens in {trained['seconds']:.0f} s"
    )
    print(f"written to {write_result('quality-plain', machine, result)}")
