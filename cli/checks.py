"""The checks of `gpt doctor`: each tells what is there, and what that means for a run."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cli import installed
from engine.config import PRESETS
from engine.planning import GIB, Setup, peak_memory, step_memory

HUB_SECONDS = 2.0
# Below this not even a tokenizer can be written.
LEAST_DISK = 100 * 2**20
# Nothing runs without these packages; the others have what is missing without them.
NEEDED = ("torch", "numpy", "sentencepiece", "safetensors", "typer", "rich")
OPTIONAL = {
    "triton": "the kernels run as plain PyTorch",
    "numba": "generation on a CPU takes several times as long",
    "datasets": "no data sets of the hub: built-in stories and local files",
    "matplotlib": "no plots",
    "wandb": "no --wandb",
    "sacrebleu": "gpt evaluate without BLEU",
    "rouge-score": "gpt evaluate without ROUGE",
    "fastapi": "no gpt serve",
    "uvicorn": "no gpt serve",
    "tokenizers": "no gpt import",
    "transformers": "an exported model cannot be tried here",
}


class Finding(NamedTuple):
    name: str
    found: str
    meaning: str
    state: Literal["good", "note", "broken"] = "good"


def findings(runs: Path) -> Iterator[Finding]:
    for check in (gpus, links, nccl, kernels, decoding, cpu, memory, lambda: disk(runs), hub, packages, compiler):
        yield from check()


def gpus() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {device.total_memory / GIB:.0f} GiB, capability {device.major}.{device.minor}"
        if (device.major, device.minor) >= (8, 0):
            yield Finding(f"GPU {index}", found, f"bf16; {fitting(device.total_memory)}")
        else:
            meaning = f"fp16 with loss scaling: no bf16 before 8.0; {fitting(device.total_memory)}"
            yield Finding(f"GPU {index}", found, meaning, "note")
    if torch.cuda.is_available():
        return
    if Path("/dev/nvidiactl").exists():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        meaning = "install a torch whose CUDA the driver knows; until then --device cpu"
        yield Finding("GPU", f"one is here that this torch ({built}) cannot use", meaning, "broken")
    else:
        yield Finding("GPU", "none", "training runs on the CPU: gpt train nano is made for that", "note")


def links() -> Iterator[Finding]:
    """Say whether GPUs reach each other; where they cannot, NCCL goes through the host's memory."""
    count = torch.cuda.device_count()
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    direct = sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
    found = f"{direct} of {len(pairs)} ordered pairs of GPUs reach each other's memory"
    if direct < len(pairs):
        yield Finding("links", found, "gradients go through the host: expect slow steps", "note")
    elif pairs:
        yield Finding("links", found, "gradients go straight from GPU to GPU")


def nccl() -> Iterator[Finding]:
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        number = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("NCCL", number, "several GPUs and machines work together")
    elif torch.distributed.is_available() and torch.distributed.is_gloo_available():
        yield Finding("NCCL", "none; gloo is there", "several processes work together on CPUs, slowly")
    else:
        yield Finding("NCCL", "none, and no gloo", "one process only", "note")


def kernels() -> Iterator[Finding]:
    from kernels.backend import backend, why_not_triton

    gpu, asked = torch.cuda.is_available(), os.environ.get("GPT_KERNELS")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count() if gpu else 0)]
    # One GPU on which they do not run speaks for all.
    device = next((each for each in devices if why_not_triton(each)), devices[0] if devices else torch.device("cpu"))
    try:
        chosen, failure = backend(device), why_not_triton(device) if asked == "triton" else None
    except ValueError as error:
        chosen, failure = "none", str(error)
    if failure:
        yield Finding("kernels", f"GPT_KERNELS={asked} cannot run: {failure}", "unset it", "broken")
        return
    why = f"GPT_KERNELS={asked} says so" if asked else "no GPU"
    if gpu and not asked:
        why = why_not_triton(device) or "a probe kernel ran and gave the right answer"
    meaning = "attention, norms and loss run in this project's kernels"
    if chosen != "triton":
        meaning = "the same functions in plain PyTorch" + (": slower" if gpu else "")
    yield Finding("kernels", f"{chosen}: {why}", meaning, "note" if gpu and (asked or chosen != "triton") else "good")


def decoding() -> Iterator[Finding]:
    from kernels import cpu

    if why := cpu.why_not(torch.device("cpu"), torch.float32):
        yield Finding("decoding", f"not compiled: {why}", "generation on a CPU takes several times as long", "note")
    else:
        yield Finding("decoding", "compiled by Numba", "generation on a CPU by one function for each step")


def cpu() -> Iterator[Finding]:
    from bench.harness import device_name
    from engine.precision import bf16_speedup
    from engine.runtime import Runtime, cpu_multiplies_bf16

    vectors, native = torch.backends.cpu.get_cpu_capability(), cpu_multiplies_bf16()
    name = device_name(Runtime(torch.device("cpu"), "fp32"))
    found = f"{name} of {os.cpu_count()} cores, {vectors}, {'bf16 units' if native else 'no bf16 units'}"
    meaning = "fp32 only: bf16 would be emulated, 90x slower"
    if native:
        meaning = ", ".join(f"{name} {bf16_speedup(PRESETS[name].model):.2f}x" for name in ("nano", "tiny"))
        meaning = f"in bf16 a block trains so many times as fast as in fp32, measured: {meaning}"
    yield Finding("CPU", found, meaning)


def memory() -> Iterator[Finding]:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    yield Finding("memory", f"{total / GIB:.0f} GiB, {free / GIB:.0f} free", "on the CPU " + fitting(total, gpu=False))


def fitting(room: int, *, gpu: bool = True) -> str:
    """Say which presets train in this many bytes with a whole batch at once, and which in several passes."""

    def fits(name: str, rows: int) -> bool:
        recipe = PRESETS[name]
        tokens = rows * recipe.model.context
        return peak_memory(Setup(recipe.model, recipe.optimizer.kind, tokens, 2 if gpu else 4, gpu)) < 0.9 * room

    whole = [name for name in PRESETS if fits(name, PRESETS[name].loop.batch)]
    parts = [name for name in PRESETS if name not in whole and fits(name, 1)]
    said = [f"{', '.join(whole)} with the whole batch at once"] if whole else []
    said += [f"{', '.join(parts)} in smaller parts"] if parts else []
    return " and ".join(said) + " fit" if said else "no preset fits"


def disk(runs: Path) -> Iterator[Finding]:
    folder = next(parent for parent in (runs, *runs.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    recipe = PRESETS["large"]
    state = step_memory(Setup(recipe.model, recipe.optimizer.kind, 1))["optimizer step"]
    # One more than are kept: the next checkpoint is whole before the oldest goes.
    needed = (state["weights"] + state["optimizer"]) * (recipe.loop.keep + 1)
    found = f"{free / GIB:,.0f} GiB free at {folder}"
    if not os.access(folder, os.W_OK):
        meaning = "no run can be kept there: choose another --out"
        yield Finding("disk", f"{folder} cannot be written to", meaning, "broken")
    elif free < LEAST_DISK:
        yield Finding("disk", found, "no run fits: make room, or choose another --out", "broken")
    else:
        room = "room for" if free > needed else "TOO LITTLE for"
        meaning = f"{room} the checkpoints of large ({needed / GIB:.0f} GiB), data apart"
        yield Finding("disk", found, meaning, "good" if free > needed else "note")


def hub() -> Iterator[Finding]:
    failure, place = "huggingface_hub is not installed", "Hugging Face"
    try:
        from huggingface_hub import constants

        from engine.hub import hub_failure

        place = constants.ENDPOINT
        failure = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else hub_failure(HUB_SECONDS) or ""
    except ImportError:
        pass
    if failure:
        meaning = "built-in stories, local files, and what was downloaded before"
        yield Finding("hub", f"{place} is not reached: {failure.splitlines()[0]}", meaning, "note")
    else:
        yield Finding("hub", f"{place} answers", "data sets of the hub can be streamed, and models fetched")


def packages() -> Iterator[Finding]:
    there = {name: found for name in (*NEEDED, *OPTIONAL) if (found := installed(name))}
    torch_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
    yield Finding("packages", ", ".join(f"{name} {found}" for name, found in there.items()), f"torch for {torch_for}")
    for name in (*NEEDED, *OPTIONAL):
        if name not in there:
            loss = OPTIONAL.get(name, "nothing runs without it: pip install .")
            yield Finding(name, "not installed", loss, "broken" if name in NEEDED else "note")


def compiler() -> Iterator[Finding]:
    for name, variable, commands, use in (
        ("C compiler", "CC", ("gcc", "clang", "cc"), "Triton's launchers"),
        ("C++ compiler", "CXX", ("g++", "clang++"), "torch.compile on a CPU (--set loop.compile=true)"),
    ):
        choices = (os.environ.get(variable), *commands)
        path = next((path for each in choices if each and (path := shutil.which(each))), None)
        meaning = f"builds {use}" if path else f"needed for {use}"
        yield Finding(name, path or "none", meaning, "good" if path else "note")
