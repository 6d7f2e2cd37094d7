"""gpt bench-*: the kernels, each beside its peers."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from cli.console import print_table
from cli.options import BenchOptions, Few, integers
from engine.errors import InputError, meant


def chosen(only: str | None, known: Iterable[str], default: Iterable[str]) -> list[str]:
    """Return the names that --only gives, or the default ones. Raises InputError."""
    names = only.split(",") if only else list(default)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--only knows no {unknown[0]!r}; it knows {', '.join(known)}{meant(unknown[0], known)}")
    return names


def bench_attention(
    head_dim: Annotated[str, Option(help="Head dims, in the order to run them in.")] = "32,64,128",
    lengths: Annotated[str | None, Option(help="512 to 16,384 on a GPU, 128 to 1,024 on a CPU.")] = None,
    causal: Annotated[bool | None, Option("--causal/--full", help="Both, unless one is given.")] = None,
    tokens: Annotated[Few | None, Option(help="Batch times length: 16,384 on a GPU, 1,024 on a CPU.")] = None,
    only: Annotated[str | None, Option(help="Of ours, packed, plain, flash, efficient, cudnn, flex.")] = None,
    tune: Annotated[
        bool, Option("--tune", help="Time rows for kernels/tiles.py; --only forward, keys or queries.")
    ] = False,
    *,
    on: BenchOptions,
) -> None:
    """Time attention, forward and backward, against plain PyTorch, SDPA's kernels and compiled flex attention.

    Heads times head dim is 2,048. "packed" is ours on the same sequences, end to end. On a CPU the default run takes
    three minutes.

    Example: gpt bench-attention --head-dim 64,128 --causal --only ours,cudnn
    """
    from bench import harness, kernels
    from engine.runtime import measured_peak
    from kernels.backend import backend, why_not_triton

    machine = on.choose()
    dims, kind = integers("--head-dim", head_dim), machine.device.type
    if not {32, 64, 128, 256}.issuperset(dims):
        raise InputError(f"--head-dim is {head_dim}; it takes 32, 64, 128 and 256, with commas between")
    if tune:
        _tune(machine, dims, only, on.out)
        return
    total = tokens or kernels.TOKENS[kind]
    default = [length for length in kernels.LENGTHS[kind] if length <= total]
    sizes = integers("--lengths", lengths) if lengths else default
    if not sizes or max(sizes) > total:
        least = kernels.LENGTHS["cpu"][0]
        raise InputError(f"--lengths goes to {max(sizes, default=least):,}; --tokens is only {total:,}")
    names = chosen(only, kernels.ATTENTION, kernels.ATTENTION)
    unit, scale = ("TFLOP/s", 1e12) if kind == "cuda" else ("GFLOP/s", 1e9)
    print(f"{machine.describe()}, {total:,} tokens, {kernels.WIDTH:,} wide; forward/backward in {unit}")
    if backend(machine.device) != "triton":
        why = "no GPU here" if kind == "cpu" else why_not_triton(machine.device) or "GPT_KERNELS says so"
        print(f"{why}: ours is the torch backend")

    def place(point: dict[str, Any]) -> list[str]:
        return [str(point["head_dim"]), "causal" if point["causal"] else "full", f"{point['length']:,}"]

    def rates(point: dict[str, Any], direction: str) -> list[str]:
        return harness.cells(point[direction], names, lambda found: f"{found['flops_per_second'] / scale:.0f}")

    def line(point: dict[str, Any]) -> str:
        rows = zip(names, *(rates(point, direction) for direction in harness.DIRECTIONS), strict=True)
        figures = ", ".join(f"{name} {'/'.join(pair)}" for name, *pair in rows if set(pair) != {"-"})
        return "D {} {} T {}: {}".format(*place(point), figures)

    cases = [
        kernels.attention(machine, dim, mask, length, total // length)
        for mask, dim, length in product([True, False] if causal is None else [causal], dims, sizes)
    ]
    about = {"peak_flops": measured_peak(machine), "copy_bytes_per_second": harness.copy_bandwidth(machine.device)}
    result, path = harness.show(harness.compare(cases, names, machine, about), "attention", machine, on.out, line)
    for direction in harness.DIRECTIONS:
        rows = ([*place(point), *rates(point, direction)] for point in result["points"])
        print_table(("D", "mask", "T", *names), rows, title=f"{direction}, {unit}")
    print(f"written to {path}")
    for mask in ("causal", "full"):
        if points := [point for point in result["points"] if place(point)[1] == mask]:
            title = f"{mask} attention, {harness.device_name(machine)}, {machine.precision}"
            picture = path.with_name(f"{path.stem}-{mask}.png")
            harness.plot(points, "head_dim", "length", "flops_per_second", 1 / scale, title, unit, picture)


def _tune(machine: Any, dims: list[int], only: str | None, out: Path) -> None:
    if machine.device.type != "cuda":
        raise InputError("--tune has nothing to time without a GPU; `gpt bench-compile` says what the compiler makes")
    if machine.precision == "fp32":
        raise InputError("--tune times rows for half precision, which the table is for; try --precision bf16")
    from bench.harness import write_result
    from bench.tuning import DIRECTION, tune

    for result in tune(machine, dims, chosen(only, DIRECTION, DIRECTION)):
        path = write_result("attention-tiles", machine, result, out)
        print(result["tuned"][-1]["row"], flush=True)
    print(f"written to {path}")


def bench_decode_attention(
    batch: Annotated[str | None, Option(help="Sequences: 1,8,64 on a GPU, 1,8 on a CPU.")] = None,
    keys: Annotated[str | None, Option(help="1,024 to 32,768 on a GPU, 256 and 1,024 on a CPU.")] = None,
    head_dim: Annotated[str, Option(help="Head dims, in the order to run them in.")] = "64,128",
    group: Annotated[str, Option(help="Query heads per key head.")] = "1,4",
    only: Annotated[str | None, Option(help="Of ours, paged, plain, flash, efficient, cudnn, flex.")] = None,
    *,
    on: BenchOptions,
) -> None:
    """Time attention of one new token to a cache: which share of the memory's speed it reaches, and what peers do.

    Heads times head dim is 2,048. Without --only all run but flex, which is compiled anew at every point.

    Example: gpt bench-decode-attention --head-dim 128 --keys 4096,32768 --only ours,paged,flash
    """
    from bench import harness, kernels
    from kernels.backend import backend

    machine = on.choose()
    kind, dims, groups = machine.device.type, integers("--head-dim", head_dim), integers("--group", group)
    for dim, size in product(dims, groups):
        if dim > 256 or kernels.WIDTH % (dim * size):
            raise InputError(f"--head-dim {dim} with --group {size} does not divide {kernels.WIDTH:,}, or is above 256")
    lengths = integers("--keys", keys) if keys else kernels.KEYS[kind]
    if odd := [length for length in lengths if length % kernels.BLOCK]:
        raise InputError(f"--keys has {odd[0]}; it takes multiples of {kernels.BLOCK}, the block of the paged cache")
    batches = integers("--batch", batch) if batch else kernels.BATCHES[kind]
    names = chosen(only, kernels.DECODE, kernels.DECODE[:-1])
    print(f"{machine.describe()}; GB/s of cache read (and % of what a copy moves)")
    if backend(machine.device) != "triton":
        print("ours is the torch backend, which calls SDPA")
    copied = harness.copy_bandwidth(machine.device)

    def place(point: dict[str, Any]) -> list[str]:
        return [f"{point[each]:,}" for each in ("head_dim", "group", "batch", "keys")]

    def line(point: dict[str, Any]) -> str:
        rates = harness.cells(point, names, lambda f: f"{f['bytes_per_second'] / 1e9:,.0f} ({f['share']:.0%})")
        figures = ", ".join(f"{name} {rate}" for name, rate in zip(names, rates, strict=True) if rate != "-")
        return "D {} group {} batch {} keys {}: {}".format(*place(point), figures)

    cases = [kernels.decode(machine, copied, *size) for size in product(dims, groups, batches, lengths)]
    results = harness.compare(cases, names, machine, {"copy_bytes_per_second": copied})
    result, path = harness.show(results, "decode-attention", machine, on.out, line)
    rows = (
        [*place(p), f"{p['cache_bytes'] / 2**20:,.0f}", *harness.cells(p, names, lambda found: f"{found['share']:.0%}")]
        for p in result["points"]
    )
    print_table(("D", "group", "batch", "keys", "MiB", *names), rows, title="% of what a copy moves")
    print(f"a copy moves {copied / 1e9:,.0f} GB/s; written to {path}")


def bench_layernorm(
    widths: Annotated[str | None, Option(help="256 to 4,096 on a GPU, 256 to 1,024 on a CPU.")] = None,
    rows: Annotated[Few | None, Option(help="16,384 on a GPU, 4,096 on a CPU.")] = None,
    only: Annotated[str, Option(help="Of ours, torch, compiled.")] = "ours,torch,compiled",
    rms: Annotated[bool, Option("--rms", help="RMSNorm in place of LayerNorm.")] = False,
    *,
    on: BenchOptions,
) -> None:
    """Time LayerNorm, alone and with the residual addition, against PyTorch's own and a compiled one.

    Example: gpt bench-layernorm --widths 768,1024 --only ours,torch
    """
    from bench import harness, kernels

    machine = on.choose()
    sizes = integers("--widths", widths) if widths else kernels.WIDTHS[machine.device.type]
    names, total = chosen(only, kernels.NORMS, kernels.NORMS), rows or kernels.ROWS[machine.device.type]
    cases = [kernels.norm(machine, total, width, residual, rms) for width, residual in product(sizes, (False, True))]
    copied = harness.copy_bandwidth(machine.device)
    results = harness.compare(cases, names, machine, {"rows": total, "copy_bytes_per_second": copied})
    result, path = harness.show(results, "rmsnorm" if rms else "layernorm", machine, on.out)
    print(
        f"{machine.describe()}, {total:,} rows, ours is the {result['backend']} backend; GB/s and the share of what a "
        f"copy of as many bytes reaches (a large one: {copied / 1e9:,.0f} GB/s)"
    )

    def rate(found: dict[str, Any]) -> str:
        return f"{found['bytes_per_second'] / 1e9:,.0f}, {100 * found['share']:.0f}%"

    table = (
        [f"{p['width']:,}", "added" if p["residual"] else "", direction, *harness.cells(p[direction], names, rate)]
        for p, direction in product(result["points"], harness.DIRECTIONS)
    )
    print_table(("width", "residual", "direction", *names), table)
    print(f"written to {path}")
    title = f"{'RMSNorm' if rms else 'LayerNorm'}, {total:,} rows, {harness.device_name(machine)}, {machine.precision}"
    harness.plot(
        result["points"], "residual", "width", "share", 100, title, "% of a copy's speed", path.with_suffix(".png")
    )


def bench_cross_entropy(
    vocab: Annotated[str | None, Option(help="Of 4096, 28000, 128256; all, unless given.")] = None,
    tokens: Annotated[Few | None, Option(help="16,384 on a GPU, 2,048 on a CPU.")] = None,
    rounds: Annotated[Few | None, Option(help="Turns, for a median: 1 on a GPU, 7 on a CPU.")] = None,
    *,
    on: BenchOptions,
) -> None:
    """Time the fused last layer and loss against plain PyTorch, forward and backward, with the memory at its peak.

    Example: gpt bench-cross-entropy --vocab 28000 --rounds 9
    """
    from bench import harness, kernels

    machine = on.choose()
    kind = machine.device.type
    wanted = integers("--vocab", vocab) if vocab else [shape[0] for shape in kernels.SHAPES[kind]]
    count = tokens or kernels.LOSS_TOKENS[kind]
    cases = [kernels.loss(machine, count, *shape) for shape in kernels.SHAPES[kind] if shape[0] in wanted]
    if not cases:
        raise InputError(f"--vocab is {vocab}; it takes 4096, 28000 and 128256, with commas between")
    print(f"{machine.describe()}, {count:,} tokens")
    results = harness.compare(
        cases,
        ["ours", "plain"] if machine.precision == "fp32" else ["ours", "plain", "half"],
        machine,
        {"tokens": count},
        last=["compiled"] if kind == "cuda" else [],
        rounds=rounds or (1 if kind == "cuda" else 7),
    )
    for result in results:
        path = harness.write_result("cross-entropy", machine, result, on.out)
    rows = []
    for shape in result["shapes"]:
        peer = shape["figures"]["plain"]
        for name, found in shape["figures"].items():
            if "reason" in found:
                print(f"{name}: no figures for {shape['vocab']:,} x {shape['width']:,}: {found['reason']}")
                continue
            ratios = ("-", "-")
            if "reason" not in peer:
                ratios = (
                    f"{found['seconds'] / peer['seconds']:.2f}x",
                    f"1/{peer['peak_bytes'] / found['peak_bytes']:.1f}",
                )
            times = [f"{1e3 * found[each]:,.1f}" for each in ("forward_seconds", "seconds")]
            peak = f"{found['peak_bytes'] / 2**20:,.0f}"
            rows.append([f"{shape['vocab']:,}", f"{shape['width']:,}", name, *times, ratios[0], peak, ratios[1]])
    heads = ("vocab", "width", "loss", "forward, ms", "+ backward", "of plain", "peak, MiB", "of plain")
    print_table(heads, rows, box=None)
    print(f"written to {path}")
