"""gpt bench-compile"""

from pathlib import Path
from typing import Annotated

import typer


def bench_compile(
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
) -> None:
    """Compile every kernel at every size for sm_80, 89, 90 and 100, GPU or not: registers, spills, shared memory.

    Example: gpt bench-compile --dtype fp16
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from bench.compile_report import FAMILIES, report
    from engine.run import versions

    lines = {family: list(report(family, dtype=dtype)) for family in FAMILIES}
    table = Table("kernel", "sm", "size", "tile, warps, stages", "", "registers", "spilled", "KiB", box=None)
    for family, of_family in lines.items():
        for line in of_family:
            figures = (line["registers"], line["spilled_bytes"], f"{line['shared_bytes'] / 1024:.0f}")
            name = line["kernel"] if family == "attention" else f"{family} {line['kernel']}"
            table.add_row(name, str(line["architecture"]), *_how(line), *map(str, figures))
    Console(highlight=False).print(table)
    path = Path("bench/results") / f"compile-{dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line for each kernel.
    parts = [f'"versions": {json.dumps(versions())}']
    for family, found in lines.items():
        parts.append(f'"{family}": [\n' + ",\n".join(map(json.dumps, found)) + "\n]")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    print(f"written to {path}")


def _how(line: dict) -> tuple[str, str, str]:
    if "tile" not in line:
        return str(line.get("width", line.get("vocab"))), str(line["warps"]), "bias" if line.get("bias") else ""
    tile = line["tile"]
    flags = (("descriptors", "TMA"), ("specialize", "own warps"), ("split", "split"))
    how = ", ".join(name for flag, name in flags if tile[flag] and (flag != "split" or line["kernel"] == "keys"))
    return str(line["head_dim"]), f"{tile['queries']}x{tile['keys']} {tile['warps']} {tile['stages']}", how
