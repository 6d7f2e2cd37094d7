"""gpt bench-serving"""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Device, Precision, Results, RunArgument


def bench_serving(
    path: RunArgument,
    clients: Annotated[int, typer.Option(min=1, help="How many read a stream each at any time.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="How long they go on.")] = 60.0,
    device: Device = "auto",
    precision: Precision = "auto",
    out: Results = Path("bench/results"),
) -> None:
    """Start `gpt serve`, let many clients stream from it, and check every stream.

    Example: gpt bench-serving runs/nano --clients 64 --seconds 60
    """
    from bench.results import write_result
    from bench.serving import bench_serving
    from engine import runtime
    from engine.run import Run

    recipe, machine = Run(path).read_recipe(), runtime.choose(device, precision)
    options = ["--device", str(machine.device), "--precision", machine.precision]
    result = bench_serving(path, clients=clients, seconds=seconds, options=options)
    memory, first, gap = (result[name] for name in ("memory_bytes", "first_token_seconds", "token_gap_seconds"))
    print(f"{recipe.name}, {clients} clients for {seconds:.0f} s, {machine.describe()}")
    print(f"streams      {result['streams']:,}, {len(result['faults'])} with a fault; {result['tokens']:,} tokens")
    print(f"asked again  {result['asked_again_alone']} alone: {result['different_alone']} differ")
    print(f"tokens/s     {result['tokens_per_second']:,.0f}, {result['against_one_client']:.1f}x one client's")
    print(f"first token  {1000 * first['p50']:.0f} ms, p99 {1000 * first['p99']:.0f} ms")
    print(f"token gap    {1000 * gap['p50']:.0f} ms, p99 {1000 * gap['p99']:.0f} ms")
    print(f"memory       {memory['settled'] / 2**20:,.0f} MiB settled, {memory['end'] / 2**20:,.0f} MiB at the end")
    for fault in sorted(set(result["faults"]))[:5]:
        print(f"fault        {fault}")
    print(f"written to {write_result(f'serving-{recipe.name}', machine, {'run': path.name, **result}, out)}")
