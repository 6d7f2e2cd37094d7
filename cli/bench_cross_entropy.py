"""gpt bench-cross-entropy"""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Device, Precision, Results
from engine.errors import InputError


def bench_cross_entropy(
    vocab: Annotated[str | None, typer.Option(help="Of 4096, 28000, 128256; all, unless given.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="16,384 on a GPU, 2,048 on a CPU.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns, for a median: 1 on a GPU, 7 on a CPU.")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    out: Results = Path("bench/results"),
) -> None:
    """Time the fused last layer and loss against plain PyTorch, forward and backward, with the memory at its peak.

    Example: gpt bench-cross-entropy --vocab 28000 --rounds 9
    """
    from rich.console import Console
    from rich.table import Table

    from bench import cross_entropy
    from bench.results import write_result
    from cli.options import integers
    from engine import runtime

    machine = runtime.choose(device, precision)
    kind = machine.device.type
    shapes = cross_entropy.SHAPES[kind]
    if vocab:
        wanted = integers("--vocab", vocab)
        shapes = tuple(shape for shape in shapes if shape[0] in wanted)
        if not shapes:
            raise InputError(f"--vocab is {vocab}; it takes 4096, 28000 and 128256, with commas between")
    count = tokens or cross_entropy.TOKENS[kind]
    console = Console(highlight=False)
    console.print(f"{machine.describe()}, {count:,} tokens")
    for result in cross_entropy.bench_cross_entropy(
        machine, shapes=shapes, tokens=count, rounds=rounds or (1 if kind == "cuda" else 7)
    ):
        path = write_result("cross-entropy", machine, result, out)
    table = Table("vocab", "width", "loss", "forward, ms", "+ backward", "of plain", "peak, MiB", "of plain", box=None)
    for shape in result["shapes"]:
        peer = shape["figures"]["plain"]
        for name, figures in shape["figures"].items():
            row = [f"{shape['vocab']:,}", f"{shape['width']:,}", name]
            if "reason" in figures:
                console.print(f"{name}: no figures for {row[0]} x {row[1]}: {figures['reason']}")
                continue
            table.add_row(
                *row,
                f"{1e3 * figures['forward_seconds']:,.1f}",
                f"{1e3 * figures['seconds']:,.1f}",
                f"{figures['seconds'] / peer['seconds']:.2f}x" if "seconds" in peer else "-",
                f"{figures['peak_bytes'] / 2**20:,.0f}",
                f"1/{peer['peak_bytes'] / figures['peak_bytes']:.1f}" if "peak_bytes" in peer else "-",
            )
    console.print(table)
    print(f"written to {path}")
