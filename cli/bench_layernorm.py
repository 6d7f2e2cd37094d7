"""gpt bench-layernorm"""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Device, Precision, Results
from engine.errors import InputError


def bench_layernorm(
    widths: Annotated[str | None, typer.Option(help="256 to 4,096 on a GPU, 256 to 1,024 on a CPU.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="16,384 on a GPU, 4,096 on a CPU.")] = None,
    only: Annotated[str, typer.Option(help="Of ours, torch, compiled.")] = "ours,torch,compiled",
    device: Device = "auto",
    precision: Precision = "auto",
    out: Results = Path("bench/results"),
) -> None:
    """Time LayerNorm, alone and with the residual addition, against PyTorch's own and a compiled one.

    Example: gpt bench-layernorm --widths 768,1024 --only ours,torch
    """
    from rich.console import Console
    from rich.table import Table

    from bench import layernorm
    from bench.results import device_name, write_result
    from cli.options import integers
    from engine import runtime

    machine = runtime.choose(device, precision)
    chosen = integers("--widths", widths) if widths else layernorm.WIDTHS[machine.device.type]
    names = only.split(",")
    if unknown := [name for name in names if name not in layernorm.PROVIDERS]:
        raise InputError(f"--only knows no {unknown[0]!r}; it knows {', '.join(layernorm.PROVIDERS)}")
    total = rows or layernorm.ROWS[machine.device.type]
    said: set[str] = set()
    for result in layernorm.bench_layernorm(machine, widths=chosen, rows=total, providers=names):
        path = write_result("layernorm", machine, result, out)
        for direction in layernorm.DIRECTIONS:
            for name, figures in result["points"][-1][direction].items():
                line = f"{name}: no {direction}: {figures.get('reason')}"
                if "reason" in figures and line not in said:
                    said.add(line)
                    print(line, flush=True)
    console = Console(highlight=False)
    console.print(
        f"{machine.describe()}, {total:,} rows, ours is the {result['backend']} backend; GB/s and the share of what a "
        f"copy of as many bytes reaches (a large one: {result['copy_bytes_per_second'] / 1e9:,.0f} GB/s)"
    )
    table = Table("width", "residual", "direction", *names)
    for point in result["points"]:
        for direction in layernorm.DIRECTIONS:
            cells = [
                f"{found['bytes_per_second'] / 1e9:,.0f}, {100 * found['share']:.0f}%" if "share" in found else "-"
                for found in (point[direction][name] for name in names)
            ]
            table.add_row(f"{point['width']:,}", "added" if point["residual"] else "", direction, *cells)
    console.print(table)
    print(f"written to {path}")
    picture = path.with_suffix(".png")
    if layernorm.plot(result, f"{device_name(machine)}, {machine.precision}", picture):
        print(f"drawn in {picture}")
