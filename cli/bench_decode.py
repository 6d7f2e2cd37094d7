"""gpt bench-decode"""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Device, GenerationPrecision, Results, integers
from engine.errors import InputError


def bench_decode(
    preset: Annotated[str, typer.Argument(help="nano, tiny or large.")] = "nano",
    batch: Annotated[str, typer.Option(help="Sequences at once.")] = "1,8,32",
    only: Annotated[str | None, typer.Option(help="Of transformers, ours, without graphs.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="The median of so many.")] = 5,
    device: Device = "auto",
    precision: GenerationPrecision = "auto",
    out: Results = Path("bench/results"),
) -> None:
    """Time generation against transformers on the same weights: tokens per second, time to the first token.

    Example: gpt bench-decode tiny --batch 1,32
    """
    import importlib.util

    from rich.console import Console
    from rich.table import Table

    from bench import decoding as bench
    from bench.results import write_result
    from engine import config, runtime

    machine = runtime.choose(device, precision)
    model = config.preset(preset).model
    wanted = ["transformers", "ours"] + (["without graphs"] if machine.device.type == "cuda" else [])
    names = only.split(",") if only else wanted
    if unknown := [name for name in names if name not in bench.PROVIDERS]:
        raise InputError(f"--only knows no {unknown[0]!r}; it knows {', '.join(bench.PROVIDERS)}")
    if "transformers" in names and importlib.util.find_spec("transformers") is None:
        print("transformers is not installed (pip install 'gpt[hf]'): there is no peer to compare with")
        names.remove("transformers")
    print(f"{preset}, {machine.describe()}")
    table = Table("batch", "who", "tokens/s", "against the first", "first token", "of bandwidth", "same tokens")
    points = []
    suffix = "-int8" if machine.precision == "int8" else ""
    for point in bench.bench_decoding(
        model, machine, batches=integers("--batch", batch), providers=names, rounds=rounds
    ):
        points.append(point)
        path = write_result(f"decode-{preset}{suffix}", machine, {"rounds": rounds, "points": points}, out)
        for name in names:
            found, first = point[name], point[names[0]]
            table.add_row(
                str(point["batch"]),
                name,
                f"{found['tokens_per_second']:,.0f}",
                f"{found['tokens_per_second'] / first['tokens_per_second']:.2f}x",
                f"{found['first_token_seconds'] * 1000:,.1f} ms",
                f"{found['bandwidth_share']:.0%}",
                f"{found['same_tokens']:.0%}",
            )
    Console(highlight=False).print(table)
    print(f"written to {path}")
