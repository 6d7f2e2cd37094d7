"""gpt bench-decode-attention"""

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import Device, Precision, Results, integers
from engine.errors import InputError


def bench_decode_attention(
    batch: Annotated[str | None, typer.Option(help="Sequences: 1,8,64 on a GPU, 1,8 on a CPU.")] = None,
    keys: Annotated[str | None, typer.Option(help="1,024 to 32,768 on a GPU, 256 and 1,024 on a CPU.")] = None,
    head_dim: Annotated[str, typer.Option(help="Head dims, in the order to run them in.")] = "64,128",
    group: Annotated[str, typer.Option(help="Query heads per key head.")] = "1,4",
    only: Annotated[str | None, typer.Option(help="Of ours, paged, plain, flash, efficient, cudnn, flex.")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    out: Results = Path("bench/results"),
) -> None:
    """Time attention of one new token to a cache: which share of the memory's speed it reaches, and what peers do.

    Heads times head dim is 2,048. Without --only all run but flex, which is compiled anew at every point.

    Example: gpt bench-decode-attention --head-dim 128 --keys 4096,32768 --only ours,paged,flash
    """
    from rich.console import Console
    from rich.table import Table

    from bench import decode_attention as bench
    from bench.results import write_result
    from engine import runtime
    from kernels.backend import backend

    machine = runtime.choose(device, precision)
    head_dims, groups = integers("--head-dim", head_dim), integers("--group", group)
    for dim, size in ((dim, size) for dim in head_dims for size in groups):
        if dim > 256 or bench.WIDTH % (dim * size):
            raise InputError(f"--head-dim {dim} with --group {size} does not divide {bench.WIDTH:,}, or is above 256")
    lengths = integers("--keys", keys) if keys else list(bench.KEYS[machine.device.type])
    if odd := [length for length in lengths if length % bench.BLOCK]:
        raise InputError(f"--keys has {odd[0]}; it takes multiples of {bench.BLOCK}, the block of the paged cache")
    batches = integers("--batch", batch) if batch else list(bench.BATCHES[machine.device.type])
    names = only.split(",") if only else list(bench.DEFAULT)
    if unknown := [name for name in names if name not in bench.PROVIDERS]:
        raise InputError(f"--only knows no {unknown[0]!r}; it knows {', '.join(bench.PROVIDERS)}")
    print(f"{machine.describe()}; GB/s of cache read (and % of what a copy moves)")
    if backend(machine.device) != "triton":
        print("ours is the torch backend, which calls SDPA")
    table = Table("D", "group", "batch", "keys", "MiB", *names, title="% of what a copy moves")
    said: set[tuple[str, str]] = set()
    for result in bench.bench_decode_attention(
        machine, head_dims=head_dims, groups=groups, batches=batches, keys=lengths, providers=names
    ):
        path = write_result("decode-attention", machine, result, out)
        point = result["points"][-1]
        for name in names:
            if (reason := point[name].get("reason")) and (name, reason) not in said:
                print(f"{name}: {reason}", flush=True)
                said.add((name, reason))
        place = [f"{point[each]:,}" for each in ("head_dim", "group", "batch", "keys")]
        shares = [f"{point[name]['share']:.0%}" if "share" in point[name] else "-" for name in names]
        table.add_row(*place, f"{point['cache_bytes'] / 2**20:,.0f}", *shares)
        measured = ", ".join(f"{name} {_figure(point[name])}" for name in names if "share" in point[name])
        print("D {} group {} batch {} keys {}: {}".format(*place, measured), flush=True)
    Console(highlight=False).print(table)
    print(f"a copy moves {result['copy_bytes_per_second'] / 1e9:,.0f} GB/s; written to {path}")


def _figure(figures: dict[str, Any]) -> str:
    return f"{figures['bytes_per_second'] / 1e9:,.0f} ({figures['share']:.0%})"
