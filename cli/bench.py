"""gpt bench-*: training, generation and the server beside their peers, and what the compiler makes of the kernels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from cli.bench_kernels import chosen
from cli.console import print_table
from cli.options import BenchOptions, Device, Few, GenerationPrecision, RunArgument, Temperature, integers
from engine.config import Weight
from engine.errors import InputError, meant

BATCHES = {"nano": 16, "tiny": 8, "large": 4}


@dataclass(frozen=True)
class DecodeOptions(BenchOptions):
    device: Device = "auto"
    precision: GenerationPrecision = "auto"


def bench_train(
    preset: Annotated[str, Argument(help="nano, tiny or large.")] = "nano",
    batch: Annotated[Few | None, Option(help="Sequences in a step, each as long as the context.")] = None,
    context: Annotated[Few | None, Option(help="Instead of the preset's.")] = None,
    rounds: Annotated[Few, Option(help="Steps to take the median of.")] = 10,
    compile: Annotated[bool, Option("--compile", help="Also time torch.compile.")] = False,
    *,
    on: BenchOptions,
) -> None:
    """Time the training step against a plain PyTorch GPT of the same shape, in the same process.

    Example: gpt bench-train tiny --rounds 5
    """
    from bench.harness import write_result
    from bench.training import bench_training
    from engine import config

    recipe = config.override(config.preset(preset), "loop.batch", batch or BATCHES[preset])
    title = f"training-{preset}"
    if context is not None:
        recipe, title = config.override(recipe, "model.context", context), f"{title}-{context}"
    machine = on.choose()
    print(f"{preset}, batch {recipe.loop.batch} x {recipe.model.context}, {machine.describe()}")
    for result in bench_training(recipe, machine, rounds=rounds, compile=compile):
        path = write_result(title, machine, result, on.out)
    rows = []
    for name, found in result["variants"].items():
        ratio = found["against_plain"] and f"{found['against_plain']:.2f}x"
        speeds = [f"{found['tokens_per_second']:,.0f}", ratio or "-", f"{100 * found['mfu']:.0f}%"]
        memory = f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB"
        rows.append([name, *speeds, f"{found['start_up_seconds']:.1f} s", memory])
    print_table(("variant", "tokens/s", "against plain", "of peak", "start-up", "peak memory"), rows)
    for name, why in result["missing"].items():
        print(f"{name}: {why['reason']}")
    print(f"written to {path}")


def bench_quality(
    data: Annotated[str, Argument(help="A folder made by `gpt data prepare`.")],
    minutes: Annotated[float, "budget.minutes", Option(help="How long the plain trainer runs.")] = 2.75,
    batch: Annotated[Few, Option(help="Sequences in a step, each as long as the context.")] = 16,
    rate: Annotated[Weight, Option(help="Its learning rate.")] = 1e-3,
    device: Device = "auto",
) -> None:
    """What the plain trainer reaches on the same text in the same time: compare with `gpt train nano --minutes`.

    Example: gpt bench-quality data/tinystories --minutes 2.75
    """
    from bench.harness import write_result
    from bench.training import train_plain
    from engine import config, runtime

    recipe = config.override(config.preset("nano"), "loop.batch", batch)
    machine = runtime.choose(device, "fp32")
    result = train_plain(recipe, data, machine, seconds=60 * minutes, rate=rate)
    trained, evaluation = result["trained"], result["evaluation"]
    print(
        f"plain: loss {evaluation['loss']:.4f}, {evaluation['bits_per_byte']:.4f} bits per byte "
        f"after {trained['tokens']:,} tokens in {trained['seconds']:.0f} s"
    )
    print(f"written to {write_result('quality-plain', machine, result)}")


def bench_decode(
    preset: Annotated[str, Argument(help="nano, tiny or large, or a run, for its shape alone.")] = "nano",
    batch: Annotated[str, Option(help="Sequences at once.")] = "1,8,32",
    threads: Annotated[str | None, Option(help="Of a CPU, as 1,2; else as many as PyTorch takes.")] = None,
    only: Annotated[str | None, Option(help="Of transformers, ours, without graphs.")] = None,
    llama_cpp: Annotated[Path | None, Option(help="The file llama-batched-bench: a peer.")] = None,
    temperature: Temperature = 0.0,
    plot: Annotated[bool, Option("--plot", help="Also draw tokens/s over batch and context.")] = False,
    rounds: Annotated[Few, Option(help="The median of this many.")] = 5,
    *,
    on: DecodeOptions,
) -> None:
    """Time generation against transformers and llama.cpp on the same weights: tokens per second, the first token.

    llama.cpp has no sampling in it, and for int8 q8_0. "of N" is the first token after a prompt of N.

    Example: gpt bench-decode tiny --batch 1,32 --threads 1,2 --llama-cpp build/bin/llama-batched-bench
    """
    import importlib.util
    import os

    import torch

    from bench import decoding, harness
    from cli.training import named_recipe
    from engine import config

    machine = on.choose()
    model = named_recipe(preset).model
    preset = preset if preset in config.PRESETS else Path(preset).resolve().name
    default = ["transformers", "ours"] + (["without graphs"] if machine.device.type == "cuda" else [])
    names = chosen(only, decoding.PROVIDERS, default)
    if "transformers" in names and importlib.util.find_spec("transformers") is None:
        print("transformers is not installed (pip install 'transformers>=4.48'): there is no peer to compare with")
        names.remove("transformers")
    counts = integers("--threads", threads) if threads else [torch.get_num_threads()]
    if threads and max(counts) > (cores := os.cpu_count() or 1):
        raise InputError(f"--threads is {threads}; this machine has {cores} cores")
    torch.set_num_threads(max(counts))  # the results are named for it
    batches = integers("--batch", batch)
    sizes = [size for count in counts for size in decoding.table(model, count, batches)]
    sizes += [size for count in counts for size in decoding.sweeps(model, count)] if plot else []
    print(f"{preset}, {machine.describe()}")
    results = decoding.bench_decoding(
        model, machine, sizes, providers=names, rounds=rounds, temperature=temperature, program=llama_cpp
    )
    title = f"decode-{preset}" + ("-int8" if machine.precision == "int8" else "") + ("-sampled" if temperature else "")
    result, path = harness.show(results, title, machine, on.out)
    rows = []
    for point in result["points"]:
        for name in ["llama.cpp"] * bool(llama_cpp) + names:
            found = point[name]
            if point["sweep"] or "reason" in found:
                continue
            ours = point.get("ours", {}).get("tokens_per_second")
            ratio = f"{ours / found['tokens_per_second']:.2f}x" if ours and name != "ours" else ""
            first = [f"{1000 * found[key]:,.1f}" for key in ("first_token_seconds", "long_first_token_seconds")]
            shares = [f"{found[key]:.0%}" if key in found else "-" for key in ("bandwidth_share", "same_tokens")]
            place = [str(point["threads"]), str(point["batch"]), name]
            rows.append([*place, f"{found['tokens_per_second']:,.0f}", ratio, *first, *shares])
    heads = ("threads", "batch", "who", "tokens/s", "ours is", "first, ms", f"of {sizes[0].long}", "bandwidth", "same")
    print_table(heads, rows, box=None, padding=(0, 1, 0, 0))
    print(f"written to {path}")
    if plot:
        about = f"{preset}, {machine.precision}, {harness.device_name(machine).rpartition(',')[0]}"
        decoding.draw([point for point in result["points"] if point["sweep"]], about, path.with_suffix(".png"))


def bench_serving(
    path: RunArgument,
    clients: Annotated[Few, Option(help="How many read a stream each at any time.")] = 64,
    seconds: Annotated[float, "at least 1 and at most 1000000", Option(help="How long they go on.")] = 60.0,
    slots: Annotated[Few | None, Option(help="Those of gpt serve; else one for each client.")] = None,
    *,
    on: BenchOptions,
) -> None:
    """Start `gpt serve`, let many clients stream from it, and check every stream.

    Example: gpt bench-serving runs/nano --clients 64 --seconds 60
    """
    from bench.harness import write_result
    from bench.serving import bench_serving
    from engine.run import Run

    recipe, machine = Run(path).read_recipe(), on.choose()
    options = ["--device", str(machine.device), "--precision", machine.precision, "--slots", str(slots or clients)]
    result = bench_serving(path, clients=clients, seconds=seconds, options=options)
    memory, first, gap = (result[name] for name in ("memory_bytes", "first_token_seconds", "token_gap_seconds"))
    health = {name: 1000 * value for name, value in result["health_seconds"].items()}
    print(f"{recipe.name}, {clients} clients for {seconds:.0f} s, {machine.describe()}")
    print(f"streams      {result['streams']:,}, {len(result['faults'])} with a fault; {result['tokens']:,} tokens")
    print(f"refused      {result['refused']:,}: the server was full")
    print(f"asked again  {result['asked_again_alone']} alone: {result['different_alone']} differ")
    print(f"tokens/s     {result['tokens_per_second']:,.0f}, {result['against_one_client']:.1f}x one client's")
    print(f"first token  {1000 * first['p50']:.0f} ms, p99 {1000 * first['p99']:.0f} ms")
    print(f"token gap    {1000 * gap['p50']:.0f} ms, p99 {1000 * gap['p99']:.0f} ms")
    means = result["mean_seconds_told_by_the_server"].items()
    print("/metrics     " + ", ".join(f"gpt_{name} {1000 * mean:.1f} ms" for name, mean in means) + " (means)")
    print(f"health       {health['p50']:.0f} ms, p99 {health['p99']:.0f} ms, at worst {health['worst']:.0f} ms")
    names = {"one_client": "with one client", "settled": "settled", "end": "at the end"}
    print("memory       " + ", ".join(f"{memory[key] / 2**20:,.0f} MiB {name}" for key, name in names.items()))
    for fault in sorted(set(result["faults"]))[:5]:
        print(f"fault        {fault}")
    print(f"written to {write_result(f'serving-{recipe.name}', machine, {'run': path.name, **result}, on.out)}")


def bench_compile(
    dtype: Annotated[str, Option(help="bf16, fp16 or fp32.")] = "bf16",
    options: Annotated[bool, Option("--options", help="Attention with every option: 1,000 kernels.")] = False,
    model: Annotated[int | None, Option(help="Bounds on paper for sm_80, 89, 90, 100 or 120.")] = None,
) -> None:
    """Compile every kernel at every size for sm_80, 89, 90, 100 and 120, GPU or not: registers, spills, shared memory.

    Example: gpt bench-compile --model 90
    """
    from bench.compile_report import ARCHITECTURES, ELEMENT_SIZE, FAMILIES, OPTIONS, known_spill, report

    if dtype not in ELEMENT_SIZE:
        raise InputError(f"--dtype is {dtype}; it must be {', '.join(ELEMENT_SIZE)}{meant(dtype, ELEMENT_SIZE)}")
    if model is not None:
        if model not in ARCHITECTURES:
            raise InputError(f"--model is {model}; it must be {', '.join(map(str, ARCHITECTURES))}")
        _model(model)
        return
    families = OPTIONS if options else FAMILIES
    lines = {family: list(report(family, dtype=dtype)) for family in families}
    rows = []
    for family, line in ((family, line) for family, found in lines.items() for line in found):
        if options and not line["spilled_bytes"]:  # the file has them all
            continue
        name = line["kernel"] if family.startswith("attention") else f"{family} {line['kernel']}"
        figures = (line["registers"], line["spilled_bytes"], f"{line['shared_bytes'] / 1024:.0f}")
        why = (known_spill(line) or "not known") if line["spilled_bytes"] else ""
        rows.append([name, str(line["architecture"]), *_how(line), *map(str, figures), why])
    print_table(
        ("kernel", "sm", "size", "tile, warps, stages", "", "registers", "spilled", "KiB", "why"), rows, box=None
    )
    _write(f"compile-options-{dtype}" if options else f"compile-{dtype}", lines)


def _write(name: str, lines: dict[str, Any]) -> None:
    """Write what was compiled: each kernel gets a line of the file."""
    import json

    from engine.disk import write_atomically
    from engine.run import versions

    parts = [
        f'"{family}": '
        + ("[\n" + ",\n".join(map(json.dumps, found)) + "\n]" if isinstance(found, list) else json.dumps(found))
        for family, found in ({"versions": versions()} | lines).items()
    ]
    path = BenchOptions.out / f"{name}.json"
    write_atomically(path, "{\n" + ",\n".join(parts) + "\n}\n")
    print(f"written to {path}")


def _model(architecture: int) -> None:
    from bench.floor import PREDICTIONS, floor

    found = floor(architecture, BenchOptions.out)
    rows = []
    for line in found["rows"]:
        if "bound" in line:
            figures = (line["registers"], line["spilled_bytes"], line["programs"], line["limit"])
            speeds = (f"{line[name] / 1e12:,.0f}" for name in PREDICTIONS)
            rows.append([line["kernel"], line["peer"], *_how(line), *map(str, figures), *speeds])
    heads = ("kernel", "whose", "D", "tile, warps, stages", "", "registers", "spilled", "programs", "limit")
    print_table((*heads, *PREDICTIONS), rows, box=None, title=f"{found['chip']['name']}, causal, bf16, TFLOP/s at most")
    for line in found["rows"]:
        if "bound" not in line:
            print(f"{line['peer']}: no bound at head dim {line['head_dim']}: {line['reason']}")
    for kernel, trust in found["trust"].items():
        by = ", ".join(f"{trust[name]:.2f} by {name}" for name in PREDICTIONS)
        print(f"{kernel}: {trust['rows']} rows were timed; rank correlation {by}")
    _write(f"floor-sm{architecture}", found)


def _how(line: dict[str, Any]) -> tuple[str, str, str]:
    if "tile" not in line:
        return str(line.get("width", line.get("vocab"))), str(line["warps"]), "bias" if line.get("bias") else ""
    tile = line["tile"]
    flags = (("descriptors", "TMA"), ("split", "split"))
    how = ", ".join(name for flag, name in flags if tile[flag] and (flag != "split" or line["kernel"] == "keys"))
    return str(line["head_dim"]), f"{tile['queries']}x{tile['keys']} {tile['warps']} {tile['stages']}", how
