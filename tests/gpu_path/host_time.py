"""How long the host takes for a call, a training step and a step of decoding: of this tree, beside another one.

    git worktree add ../before COMMIT
    python -m tests.gpu_path.host_time ../before --write bench/results/host-time.json

No GPU is there, and nothing of one is timed: Triton's launcher is the real one, on a driver that does nothing, and
PyTorch's operations run on the CPU, on tensors so small that their arithmetic takes no time. Each tree has a process,
and the two work in turn. What counts is CPU time: the least of all rounds, and the ratio of the two.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

HERE = Path(__file__).parents[2]
CASES = {
    "attention forward": 200, "attention forward and backward": 200, "layer norm forward": 200,
    "layer norm forward and backward": 200, "loss forward and backward": 50, "training step": 4, "decoding step": 10,
    "decoding step beside its graph": 50,
}  # fmt: skip
# Steps of a batcher on a CPU for so many texts, beside the model and the choice of likeliest tokens.
BATCHES = {f"step of {texts} texts on a CPU": texts for texts in (1, 8, 32, 64)}
CASES |= dict.fromkeys(BATCHES, 50)
ROUNDS = 15


def launch_nowhere() -> None:
    """Let kernels be compiled for sm_90 and launched on the stub, from tensors of the CPU."""
    from tests.gpu_path import driver

    driver.install(90)
    import triton
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver as current

    from kernels import cross_entropy, tiles

    # Without the notes about each kernel and each launch, which take longer than it.
    knobs.runtime.jit_post_compile_hook = None
    current.active.launcher_cls = nvidia.CudaLauncher
    current.active.get_current_device, current.active.get_current_stream = (lambda: 0), (lambda device: 0)
    set_allocator = triton.set_allocator
    patched: Any = triton
    patched.set_allocator = lambda unused: set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8)
    )
    rows, heights = tiles.rows, cross_entropy.block_rows
    patched = tiles
    if hasattr(tiles, "architecture"):
        patched.architecture = lambda device: 90
    else:  # of a tree before it
        patched.tile = lambda kernel, device, head_dim, element_size: rows(kernel, 90, head_dim, element_size)[0]
    patched.multiprocessors = lambda device: 132
    patched = cross_entropy
    patched.block_rows = lambda rows, vocab, element_size, *, gpu: heights(rows, vocab, element_size, gpu=True)


def calls(folder: Path) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    from kernels import flash_attention, layer_norm, linear_cross_entropy

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)

    def both(function: Callable[[], Any], *inputs: torch.Tensor) -> Callable[[], object]:
        gradient = torch.ones_like(function())
        return lambda: torch.autograd.grad(function(), inputs, gradient)

    q, k, v, x = *(tensor(1, 16, 2, 64) for _ in "qkv"), tensor(16, 64)
    weight, head, targets = torch.ones(64, requires_grad=True), tensor(64, 64), torch.arange(16)
    attend, norm = (lambda: flash_attention(q, k, v)), (lambda: layer_norm(x, weight, residual=x)[0])
    step, decode, choose = training(folder), *decoding()
    turns = (
        attend, both(attend, q, k, v), norm, both(norm, x, weight),
        both(lambda: linear_cross_entropy(x, head, targets), x, head), step, decode, choose,
        *map(batching, BATCHES.values()),
    )  # fmt: skip
    return dict(zip(CASES, turns, strict=True))


def training(folder: Path) -> Callable[[], object]:
    """Return a training step of tiny's depth, one short row at a time."""
    from engine.config import BudgetConfig, Recipe, override, preset
    from engine.model import GPT
    from engine.run import Run
    from engine.runtime import Runtime
    from train.data.loader import Batch
    from train.loop import Loop
    from train.stage import Amounts, Stage

    recipe: Recipe = replace(preset("tiny"), budget=BudgetConfig(steps=1000))
    sizes = {"width": 16, "heads": 1, "context": 16, "vocab_size": 64}
    for name, value in {**{f"model.{name}": size for name, size in sizes.items()}, "loop.batch": 1}.items():
        recipe = override(recipe, name, value)
    tokens = torch.arange(16)

    class Batches:
        tokens, epoch = 0, 0.0

        def __next__(self) -> Batch:
            self.tokens += 16
            return Batch(tokens, tokens, torch.tensor([0, 7, 16], dtype=torch.int32), 9)

        def batches_per_epoch(self) -> float:
            return 1000.0

        def give_up(self) -> None: ...

    stage: Any = Stage(recipe, Batches(), lambda *unused: {}, lambda model: [], Amounts("", "", lambda *unused: ""))  # type: ignore[arg-type]
    model = GPT(recipe.model)
    model.compute_dtype = torch.bfloat16
    # In bf16 a CPU multiplies Muon's batches of matrices one by one.
    runtime = Runtime(torch.device("cpu"), "fp32", peak_flops=1.0)
    run: Any = Run(folder)
    run.identity = lambda recipe: {}
    loop: Any = Loop(model, stage, run, runtime, [], lambda message: None)
    # What no kernel has written may not be finite, and such steps are skipped.
    gradients = loop._gradients
    loop._gradients = lambda *arguments: (gradients(*arguments), (1.0, 1.0))[1]
    return lambda: loop._train_step(0.5)


def decoding() -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a step for four texts, with all of the model's launches; and what is left of it beside a CUDA graph."""
    from engine.batcher import Batcher, Request
    from engine.config import ModelConfig
    from engine.model import GPT
    from engine.sampling import Sampling

    def made() -> Batcher:
        config = ModelConfig(vocab_size=64, width=16, blocks=12, heads=1, context=100_000)
        model = GPT(config).eval()
        model.compute_dtype = torch.bfloat16
        batcher = Batcher(model, slots=4, graphs=False)
        for seed in range(4):
            batcher.submit(Request([1, 2, 3], Sampling(seed=seed), 90_000))
        batcher.step()
        return batcher

    whole, beside = made(), made()
    logits, decoder, other = torch.randn(4, 64), whole.decoder, beside.decoder
    scores: Any = decoder.logits
    patched: Any = decoder
    patched.logits = lambda rows, reach: (scores(rows, reach), logits)[1]
    patched = other
    patched.logits = lambda rows, reach: logits
    return whole.step, beside.step


def batching(texts: int) -> Callable[[], object]:
    """Return a batcher's step on a CPU, without what computes scores: of a native step all but the call itself."""
    from engine.batcher import Batcher, Request
    from engine.config import ModelConfig
    from engine.model import GPT
    from engine.sampling import Sampling

    asked = os.environ.pop("GPT_KERNELS")
    model = GPT(ModelConfig(vocab_size=64, width=16, blocks=1, heads=1, context=2048)).eval()
    batcher: Any = Batcher(model, slots=texts)
    for _ in range(texts):
        batcher.submit(Request([1, 2, 3], Sampling(temperature=0), 2000))
    while batcher.producing < texts:
        batcher.step()
    os.environ["GPT_KERNELS"] = asked
    if getattr(batcher, "native", None) is None:
        logits = torch.randn(texts, 64)
        batcher.decoder.logits = lambda rows, reach: logits
    else:
        batcher.native._run = lambda *unused: 1
    return batcher.step


def functions_called(function: Callable[[], object]) -> int:
    """Return how many functions one call enters, those of C that Python calls counted in."""
    entered = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event in ("call", "c_call")

    for _ in range(3):
        function()
    sys.setprofile(note)
    function()
    sys.setprofile(None)
    return entered


def work(*, count: bool) -> None:
    """Answer each name on standard input with the microseconds of one call; or print how many functions it enters."""
    launch_nowhere()
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # it compiles small products anew, and takes longer for them
    with TemporaryDirectory() as folder:
        ready = calls(Path(folder))
        if count:
            print(json.dumps({name: functions_called(function) for name, function in ready.items()}))
            return
        for line in sys.stdin:
            name = line.strip()
            ready[name]()
            begin = time.process_time()
            for _ in range(CASES[name]):
                ready[name]()
            print(1e6 * (time.process_time() - begin) / CASES[name], flush=True)


def compare(trees: dict[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """Return for each case the least microseconds of each tree, and their ratio."""
    workers = {}
    for name, tree in trees.items():
        # This file, with the other tree's packages, and the stub of this one.
        environment = os.environ | {"GPT_KERNELS": "triton", "PYTHONPATH": f"{tree}:{HERE}", "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        words = [sys.executable, "-P", __file__, "--work"]
        workers[name] = subprocess.Popen(
            words, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    found: dict[str, dict[str, float]] = {case: dict.fromkeys(trees, float("inf")) for case in CASES}
    for _ in range(rounds):
        for case, least in found.items():
            for name, worker in workers.items():
                assert worker.stdin is not None and worker.stdout is not None
                print(case, file=worker.stdin, flush=True)
                least[name] = min(least[name], float(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    for least in found.values():
        least["ratio"] = least["now"] / least["before"]
    return found


def git(tree: Path) -> str:
    """Return the commit of a tree."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the root of another tree of this project")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--write", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args()
    found = compare({"before": arguments.before.resolve(), "now": HERE}, arguments.rounds)
    for case, least in found.items():
        print(f"{case:35} {least['before']:10,.1f} us before {least['now']:10,.1f} now, ratio {least['ratio']:.2f}")
    if arguments.write:
        from engine.run import versions

        about = {
            "device": "none: a driver that does nothing in place of a GPU's", "versions": versions(),
            "before": git(arguments.before), "unit": "microseconds of CPU time",
        }  # fmt: skip
        arguments.write.write_text(json.dumps(about | {"rounds": arguments.rounds, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    work(count=sys.argv[1] == "--count") if sys.argv[1:] in (["--work"], ["--count"]) else main()
