"""Training speed, ours against the plain peer in one process; and what the peer learns in a given time."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench import plain
from bench.harness import Figures, added_memory, in_turn, outcome
from engine.config import OptimizerConfig, Recipe, ScheduleConfig
from engine.model import GPT
from engine.runtime import Runtime, cpu_multiplies_bf16, measured_peak, wall_seconds
from engine.tokenizer import Tokenizer
from train.data.loader import Batch, PackedLoader
from train.data.shards import TokenShards
from train.evaluation import evaluate_loss
from train.optimizer import Optimizer, muon_dtype, rate_factor

# Documents of children's stories, in tokens: what the packed batches of the benchmark are made of.
DOCUMENT_TOKENS = (100, 256)

Step = Callable[[], Any]


def packed_batch(recipe: Recipe, device: torch.device) -> Batch:
    """Return random tokens, packed from documents of random lengths."""
    generator = torch.Generator().manual_seed(0)
    total = recipe.tokens_per_step
    bounds = [0]
    while bounds[-1] < total:
        length = int(torch.randint(*DOCUMENT_TOKENS, (), generator=generator))
        bounds.append(min(total, bounds[-1] + min(length, recipe.model.context)))
    tokens = torch.randint(0, recipe.model.vocab_size, (total,), generator=generator)
    return Batch(tokens, tokens.roll(-1), torch.tensor(bounds, dtype=torch.int32), recipe.model.context).to(device)


def training_step(model: nn.Module, optimizer: Any, loss: Callable[[], Tensor]) -> Step:
    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(recipe: Recipe, runtime: Runtime, *, compile: bool = False, kind: Literal["adamw"] | None = None) -> Step:
    """Return our step with the recipe's optimizer, or with another kind of it."""
    with runtime.device:  # to draw the weights of large takes a CPU five seconds
        model = GPT(recipe.model)
    model.compute_dtype = runtime.dtype
    config = recipe.optimizer if kind is None else OptimizerConfig(kind=kind)
    optimizer = Optimizer(model, config, matmul_dtype=muon_dtype(runtime))
    batch = packed_batch(recipe, runtime.device)

    def loss(model: GPT, batch: Batch) -> Tensor:
        return model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)

    run = torch.compile(loss) if compile else loss
    return training_step(model, optimizer, lambda: run(model, batch) / len(batch.tokens))


def plain_step(recipe: Recipe, runtime: Runtime, *, compile: bool = False, attend: plain.Attend = plain.sdpa) -> Step:
    """Return the peer's step, under autocast unless the runtime is fp32."""
    with runtime.device:
        model = plain.PlainGPT(recipe.model, attend)
    run = torch.compile(model) if compile else model
    tokens = packed_batch(recipe, runtime.device).tokens.view(-1, recipe.model.context)
    targets = tokens.roll(-1)

    def loss() -> Tensor:
        with torch.autocast(runtime.device.type, runtime.dtype, enabled=runtime.precision != "fp32"):
            return plain.row_loss(run, tokens, targets)

    return training_step(model, plain.optimizer(model), loss)


def variants(recipe: Recipe, runtime: Runtime, *, compile: bool) -> dict[str, Callable[[], Step]]:
    """Return the peer and ours with either attention and optimizer, in the precision of the run and in fp32."""
    found: dict[str, Callable[[], Step]] = {}
    for precision, end in {"fp32": ", fp32", runtime.precision: ""}.items():
        machine = dataclasses.replace(runtime, precision=precision)
        found |= {
            f"plain{end}": partial(plain_step, recipe, machine),
            f"plain, attention written out{end}": partial(plain_step, recipe, machine, attend=plain.written_out),
            f"ours{end}": partial(our_step, recipe, machine),
            f"ours, AdamW{end}": partial(our_step, recipe, machine, kind="adamw"),
        }
    if compile:
        # nanoGPT is trained so: compiled, SDPA, mixed precision, fused AdamW.
        found["plain, compiled"] = partial(plain_step, recipe, runtime, compile=True)
        found["ours, compiled"] = partial(our_step, recipe, runtime, compile=True)
    return found


def bench_training(recipe: Recipe, runtime: Runtime, *, rounds: int = 10, compile: bool = False) -> Iterator[Figures]:
    """Yield tokens per second of each variant (medians of `rounds`, in turn), start-up seconds and peak memory.

    `host_seconds` of a step pass before the host has told a GPU all of it: where they are most of it, the GPU waits.

    `missing` has the reason of each variant that cannot run. torch.compile may take minutes: what is compiled comes
    last, one at a time, each beside all others, and there is a result before each.
    """
    builds, steps = variants(recipe, runtime, compile=compile), dict[str, Step]()
    peak, tokens, on_gpu = measured_peak(runtime, seconds=1.0), recipe.tokens_per_step, runtime.device.type == "cuda"
    started, missing, shares = dict[str, Figures](), dict[str, Figures](), list[Figures]()

    def build(name: str) -> None:
        steps[name] = builds[name]()
        steps[name]()

    def start(name: str) -> Figures:
        # The peak is that of two steps with nothing made ready before them. A CPU knows only that of a whole process.
        # On a GPU the first step is one of the two: to compile it a second time may take a minute.
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(runtime.device)
        held = runtime.peak_memory()
        seconds = wall_seconds(partial(build, name), runtime.device)
        if on_gpu:
            steps[name]()
            memory = runtime.peak_memory() - held
        else:
            memory = added_memory(partial(partial, take_two, builds[name]), runtime)
        return {"start_up_seconds": seconds, "peak_memory_bytes": memory}

    def clock(name: str) -> Figures:
        host = 0.0

        def step() -> None:
            nonlocal host
            begin = time.perf_counter()
            steps[name]()
            host = time.perf_counter() - begin

        return {"seconds": wall_seconds(step, runtime.device), "host_seconds": host}

    slow = [name for name in builds if name.endswith("compiled")]
    for group in [[name for name in builds if name not in slow], *([name] for name in slow)]:
        for name in group:
            found = outcome(start, name)
            (missing if "reason" in found else started)[name] = found
        taken = in_turn({name: partial(clock, name) for name in started}, rounds)
        if "ours" in started and not shares:
            shares = profile(steps["ours"])
        speeds = {name: tokens / found["seconds"] for name, found in taken.items()}
        # The faster attention of the eager peer, in fp32 and in the precision of the run.
        eager = [name for name in speeds if name.startswith("plain") and name not in slow]
        best = {alone: [speeds[each] for each in eager if each.endswith("fp32") == alone] for alone in (False, True)}
        yield {
            "preset": recipe.name,
            "batch": recipe.loop.batch,
            "context": recipe.model.context,
            "precision": runtime.precision,
            "cpu_multiplies_bf16": cpu_multiplies_bf16(),
            "peak_flops": peak,
            "variants": {
                name: {
                    "tokens_per_second": speed,
                    "against_plain": speed / max(peers) if (peers := best[name.endswith("fp32")]) else None,
                    "mfu": speed * recipe.model.flops_per_token / peak,
                    "host_seconds": taken[name]["host_seconds"],
                    **started[name],
                }
                for name, speed in speeds.items()
            },
            "missing": missing,
            "profile": shares,
        }


def take_two(build: Callable[[], Step]) -> None:
    step = build()
    step()
    step()


def profile(step: Step) -> list[Figures]:
    """Return the ten operators with the largest share of a step's time."""
    from torch.profiler import profile

    with profile() as recorded:
        step()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {"operator": event.key, "share": round(event.self_cpu_time_total / total, 4), "calls": event.count}
        for event in events[:10]
    ]


def train_plain(recipe: Recipe, data: str, runtime: Runtime, *, seconds: float, rate: float = 1e-3) -> Figures:
    """Train the peer on prepared data for this long, with warm-up and cosine as ours, and evaluate it as ours."""
    tokenizer = Tokenizer.load(data)
    shards = {split: TokenShards(data, split, tokenizer.fingerprint) for split in ("train", "validation")}
    model_config = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    model = plain.PlainGPT(model_config).to(runtime.device)
    optimizer = plain.optimizer(model, rate)
    loader = PackedLoader(shards["train"], recipe.tokens_per_step, model_config.context, seed=0)

    def loss() -> Tensor:
        batch = next(loader).to(runtime.device)
        return plain.row_loss(model, *(each.view(-1, model_config.context) for each in (batch.tokens, batch.targets)))

    step = training_step(model, optimizer, loss)
    schedule, steps, begin = ScheduleConfig(), 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(schedule, elapsed / seconds)
        step()
        steps += 1
    loader.close()
    evaluation = evaluate_loss(
        model,  # type: ignore[arg-type]
        shards["validation"],
        tokenizer.byte_lengths,
        tokens=10**9,
        tokens_per_batch=recipe.tokens_per_step,
    )
    trained = {"steps": steps, "tokens": steps * recipe.tokens_per_step, "seconds": seconds}
    return {"trained": trained, "rate": rate, "vocabulary": tokenizer.vocab_size, "evaluation": evaluation}
