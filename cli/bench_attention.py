"""gpt bench-attention"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Device, Precision, Results, integers
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.runtime import Runtime


def bench_attention(
    head_dim: Annotated[str, typer.Option(help="Head dims, in the order to run them in.")] = "32,64,128",
    lengths: Annotated[str | None, typer.Option(help="512 to 16,384 on a GPU, 128 to 1,024 on a CPU.")] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--full", help="Both, unless one is given.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Batch times length: 16,384 on a GPU, 1,024 on a CPU.")] = None,
    only: Annotated[str | None, typer.Option(help="Of ours, plain, flash, efficient, cudnn, flex.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Time rows for kernels/tiles.py instead.")] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    out: Results = Path("bench/results"),
) -> None:
    """Time attention, forward and backward, against plain PyTorch, SDPA's kernels and compiled flex attention.

    Heads times head dim is 2,048. On a CPU the default run takes two to three minutes.

    Example: gpt bench-attention --head-dim 64,128 --causal --only ours,cudnn
    """
    from bench.attention import LENGTHS, PROVIDERS, TOKENS
    from engine import runtime

    machine = runtime.choose(device, precision)
    head_dims = integers("--head-dim", head_dim)
    if not {32, 64, 128, 256}.issuperset(head_dims):
        raise InputError(f"--head-dim is {head_dim}; it takes 32, 64, 128 and 256, with commas between")
    if tune:
        _tune(machine, head_dims, out)
        return
    total = tokens or TOKENS[machine.device.type]
    defaults = [length for length in LENGTHS[machine.device.type] if length <= total]
    chosen = integers("--lengths", lengths) if lengths else defaults
    if not chosen or max(chosen) > total:
        raise InputError(f"--lengths goes to {max(chosen, default=LENGTHS['cpu'][0]):,}; --tokens is only {total:,}")
    names = only.split(",") if only else list(PROVIDERS)
    if unknown := [name for name in names if name not in PROVIDERS]:
        raise InputError(f"--only knows no {unknown[0]!r}; it knows {', '.join(PROVIDERS)}")
    masks = [True, False] if causal is None else [causal]
    _compare(machine, head_dims, chosen, masks, total, names, out)


def _compare(
    machine: "Runtime",
    head_dims: list[int],
    lengths: list[int],
    masks: list[bool],
    tokens: int,
    names: list[str],
    out: Path,
) -> None:
    from rich.console import Console

    from bench import attention
    from bench.results import device_name, write_result
    from kernels.backend import backend, why_not_triton

    unit, scale = attention.unit(machine)
    print(f"{machine.describe()}, {tokens:,} tokens, {attention.WIDTH:,} wide; forward/backward in {unit}")
    if backend(machine.device) != "triton":
        why = "no GPU here" if machine.device.type == "cpu" else why_not_triton(machine.device) or "GPT_KERNELS says so"
        print(f"{why}: ours is the torch backend, which calls SDPA")
    said: set[str] = set()
    for result in attention.bench_attention(
        machine, head_dims=head_dims, lengths=lengths, masks=masks, tokens=tokens, providers=names
    ):
        path = write_result("attention", machine, result, out)
        point = result["points"][-1]
        for line in _missing(point, names):
            if line not in said:
                print(line, flush=True)
            said.add(line)
        cells = {name: [_figure(point[direction][name], scale) for direction in attention.DIRECTIONS] for name in names}
        figures = ", ".join(f"{name} {'/'.join(cell)}" for name, cell in cells.items() if set(cell) != {"-"})
        print(f"D {point['head_dim']} {_mask(point)} T {point['length']:,}: {figures}", flush=True)
    console = Console(highlight=False)
    for direction in attention.DIRECTIONS:
        console.print(_table(result, direction, names, f"{direction}, {unit}", scale))
    print(f"written to {path}")
    for picture in attention.plot(result, machine, f"{device_name(machine)}, {machine.precision}", path):
        print(f"drawn in {picture}")


def _missing(point: dict[str, Any], names: list[str]) -> list[str]:
    """A line for each reason why a provider has no figure."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name in names:
        for direction in ("forward", "backward"):
            if "reason" in point[direction][name]:
                reasons.setdefault((name, point[direction][name]["reason"]), []).append(direction)
    return [f"{name}: no {' and '.join(directions)}: {reason}" for (name, reason), directions in reasons.items()]


def _mask(point: dict[str, Any]) -> str:
    return "causal" if point["causal"] else "full"


def _table(result: dict[str, Any], direction: str, names: list[str], title: str, scale: float) -> Any:
    from rich.table import Table

    table = Table("D", "mask", "T", *names, title=title)
    for point in result["points"]:
        cells = [_figure(point[direction][name], scale) for name in names]
        table.add_row(str(point["head_dim"]), _mask(point), f"{point['length']:,}", *cells)
    return table


def _figure(figures: dict[str, Any], scale: float) -> str:
    return f"{figures['flops_per_second'] / scale:.0f}" if "flops_per_second" in figures else "-"


def _tune(machine: "Runtime", head_dims: list[int], out: Path) -> None:
    if machine.device.type != "cuda":
        raise InputError("--tune has nothing to time without a GPU; `gpt bench-compile` says what the compiler makes")
    if machine.precision == "fp32":
        raise InputError("--tune times rows for half precision, which the table is for; try --precision bf16")
    from bench.results import write_result
    from bench.tuning import tune

    for result in tune(machine, head_dims):
        path = write_result("attention-tiles", machine, result, out)
        print(result["tuned"][-1]["row"], flush=True)
    print(f"written to {path}")
