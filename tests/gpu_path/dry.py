"""The steps of bench/gpu_all.py on a GPU that is not there: each starts, compiles its kernels, and writes its result.

    python -m tests.gpu_path.dry FOLDER [STEP...]

Sizes are small, since all but the kernels runs on the CPU; head dims and widths are those of the step, and so are its
kernels. Nothing is right: what kernels write is 0. What is written says so in "device", and in the name of the file.
"""

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests import gpu_path

# They come behind the step's own options, and the last one counts.
SMALL = {
    "bench-attention": "--lengths 128 --tokens 128",
    "bench-decode-attention": "--batch 1 --keys 64",
    "bench-layernorm": "--rows 16",
    "bench-cross-entropy": "--tokens 16",
    "bench-train": "--batch 1 --context 64 --rounds 1",
    "bench-decode": "--batch 1 --rounds 1",
    "train": "--steps 1 --set loop.batch=1 --set data.documents=200",
}


def without_inductor(function: Any = None, **options: Any) -> Any:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise NotImplementedError("Inductor compiles for a GPU that is there")

    return fail


def shrink() -> None:
    """Let whatever is measured be small, and every result be taken for right."""
    from bench import harness, kernels, training, tuning
    from engine import config, runtime

    for name, recipe in config.PRESETS.items():
        model = replace(recipe.model, blocks=1, vocab_size=512, context=64, heads=2, width=2 * recipe.model.head_dim)
        config.PRESETS[name] = replace(recipe, model=model)
    harness.TOLERANCE.update(dict.fromkeys(harness.TOLERANCE, float("inf")))
    kernels.SHAPES["cuda"] = tuple((512, width) for _, width in kernels.SHAPES["cuda"])
    kernels.BYTES_BETWEEN = 2**10

    def added_memory(ready: Callable[[], Callable[[], Any]], *unused: Any, **options: Any) -> int:
        ready()()
        return 1

    def candidates(*arguments: Any, all: Any = tuning.candidates, **options: Any) -> Any:
        return all(*arguments, **options)[:1]

    def attention(runtime: Any, head_dim: int, causal: bool, *unused: int) -> harness.Case:
        return kernels.attention(runtime, head_dim, causal, 128, 1)

    def here(task: Callable[[Any], Any], rows: Sequence[Any], seconds: float) -> Iterator[Any]:
        return (harness.outcome(task, tile) for tile in rows)

    replaced: list[tuple[Any, dict[str, Any]]] = [
        (harness, {"copy_seconds": lambda *unused: 1.0, "added_memory": added_memory}),
        (runtime, {"measured_peak": lambda *unused, **options: 1e15}),
        (training, {"measured_peak": lambda *unused, **options: 1e15}),
        # In processes of their own there would be no device.
        (tuning, {"attention": attention, "candidates": candidates, "in_processes": here}),
    ]
    for module, names in replaced:
        for name, value in names.items():
            setattr(module, name, value)


def run(arguments: Sequence[str]) -> object:
    """Return the exit status of a command of `gpt`."""
    from cli.main import main

    sys.argv = ["gpt", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    except Exception:
        traceback.print_exc()
        return "a traceback"
    return 0


def main(folder: Path, names: Sequence[str]) -> None:
    """Run the steps that run a command of `gpt`, and write FOLDER/dry.json, of what became of each."""
    gpu = gpu_path.install(90)
    from bench.gpu_all import STEPS

    shrink()
    report: dict[str, Any] = {}
    for step in STEPS:
        out = folder / step.name
        module, command, *options = step.arguments(out)
        if module != "cli" or (names and step.name not in names):
            continue
        out.mkdir(parents=True, exist_ok=True)
        # `gpt train` takes the model as it is where Inductor fails.
        torch.compile = (lambda each, **options: each) if command == "train" else without_inductor  # type: ignore[assignment]
        gpu.launches.clear()
        gpu.problems.clear()
        began = time.monotonic()
        with (out / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            status = run([command, *options, *SMALL[command].split()])
        kernels = sorted({launch.kernel for launch in gpu.launches})
        seconds = round(time.monotonic() - began, 1)
        report[step.name] = {"exit": status, "kernels": kernels, "problems": dict(gpu.problems), "seconds": seconds}
        (folder / "dry.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
