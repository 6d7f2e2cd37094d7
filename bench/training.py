"""Training speed, ours against the plain peer in one process; and what the peer learns in a given time."""

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.plain import Attend, PlainGPT, plain_optimizer, sdpa, written_out
from engine.config import OptimizerConfig, Recipe, ScheduleConfig
from engine.model import GPT
from engine.runtime import Runtime, cpu_multiplies_bf16, measured_peak, synchronize
from engine.tokenizer import Tokenizer
from train.data.loader import Batch, PackedLoader
from train.data.shards import TokenShards
from train.evaluate import evaluate_loss
from train.optimizer import Optimizer, muon_dtype, rate_factor

# Documents of children's stories, in tokens: what the packed batches of the benchmark are made of.
DOCUMENT_TOKENS = (100, 256)

Step = Callable[[], Any]


def packed_batch(recipe: Recipe, device: torch.device) -> Batch:
    """Random tokens, packed from documents of random lengths."""
    generator = torch.Generator().manual_seed(0)
    total = recipe.tokens_per_step
    bounds = [0]
    while bounds[-1] < total:
        length = int(torch.randint(*DOCUMENT_TOKENS, (), generator=generator))
        bounds.append(min(total, bounds[-1] + min(length, recipe.model.context)))
    tokens = torch.randint(0, recipe.model.vocab_size, (total,), generator=generator)
    return Batch(tokens, tokens.roll(-1), torch.tensor(bounds, dtype=torch.int32), recipe.model.context).to(device)


def our_step(recipe: Recipe, runtime: Runtime, *, compile: bool = False, kind: str = "muon") -> Step:
    model = GPT(recipe.model).to(runtime.device)
    model.compute_dtype = runtime.dtype
    config = dataclasses.replace(OptimizerConfig(), kind=kind)  # type: ignore[arg-type]
    optimizer = Optimizer(model, config, matmul_dtype=muon_dtype(runtime))
    batch = packed_batch(recipe, runtime.device)

    def loss(model: GPT, batch: Batch) -> torch.Tensor:
        return model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)

    run = torch.compile(loss) if compile else loss

    def step() -> None:
        (run(model, batch) / len(batch.tokens)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step(recipe: Recipe, runtime: Runtime, *, compile: bool = False, attend: Attend = sdpa) -> Step:
    """The peer's step, under autocast unless the runtime is fp32."""
    model = PlainGPT(recipe.model, attend).to(runtime.device)
    optimizer = plain_optimizer(model)
    run = torch.compile(model) if compile else model
    autocast = torch.autocast(runtime.device.type, runtime.dtype, enabled=runtime.precision != "fp32")
    tokens = packed_batch(recipe, runtime.device).tokens.view(-1, recipe.model.context)
    targets = tokens.roll(-1)

    def step() -> None:
        with autocast:
            loss = F.cross_entropy(run(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def variants(recipe: Recipe, runtime: Runtime, *, compile: bool) -> dict[str, Callable[[], Step]]:
    """The peer, ours, and both with one thing changed."""
    fp32 = dataclasses.replace(runtime, precision="fp32")
    found: dict[str, Callable[[], Step]] = {
        "plain": lambda: plain_step(recipe, fp32),
        "plain, attention written out": lambda: plain_step(recipe, runtime, attend=written_out),
        "ours": lambda: our_step(recipe, runtime),
        "ours, AdamW": lambda: our_step(recipe, runtime, kind="adamw"),
    }
    if runtime.precision != "fp32":
        found["ours, fp32"] = lambda: our_step(recipe, fp32)
    if compile:
        # As nanoGPT is trained: compiled, SDPA, mixed precision, fused AdamW.
        found["plain, compiled"] = lambda: plain_step(recipe, runtime, compile=True)
        found["ours, compiled"] = lambda: our_step(recipe, runtime, compile=True)
    return found


def bench_training(recipe: Recipe, runtime: Runtime, *, rounds: int = 10, compile: bool = False) -> dict[str, Any]:
    """Tokens per second of each variant (median of `rounds`, taken in turn), start-up seconds and peak memory."""
    steps: dict[str, Step] = {}
    start_up: dict[str, float] = {}
    for name, build in variants(recipe, runtime, compile=compile).items():
        begin = time.perf_counter()
        steps[name] = build()
        steps[name]()
        synchronize(runtime.device)
        start_up[name] = time.perf_counter() - begin
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            synchronize(runtime.device)
            times[name].append(time.perf_counter() - begin)
    peak = measured_peak(runtime, seconds=1.0)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "preset": recipe.name,
        "batch": recipe.loop.batch,
        "context": recipe.model.context,
        "precision": runtime.precision,
        "cpu_multiplies_bf16": cpu_multiplies_bf16(),
        "peak_flops": peak,
        "variants": {
            name: {
                "tokens_per_second": recipe.tokens_per_step / seconds,
                "against_plain": median["plain"] / seconds,
                "mfu": recipe.tokens_per_step * recipe.model.flops_per_token / seconds / peak,
                "start_up_seconds": start_up[name],
                "peak_memory_bytes": peak_memory(recipe, runtime, name, compile=compile),
            }
            for name, seconds in median.items()
        },
        "profile": profile(steps["ours"]),
    }


def peak_memory(recipe: Recipe, runtime: Runtime, name: str, *, compile: bool) -> int:
    """The most memory that two steps add to a fresh process, in bytes."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (recipe, runtime, name, compile, torch.get_num_threads()))


def _peak_memory(recipe: Recipe, runtime: Runtime, name: str, compile: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    before = runtime.peak_memory()
    step = variants(recipe, runtime, compile=compile)[name]()
    step()
    step()
    return runtime.peak_memory() - before


def profile(step: Step) -> list[dict[str, Any]]:
    """The ten operators with the largest share of a step's time."""
    from torch.profiler import profile

    with profile() as recorded:
        step()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {"operator": event.key, "share": round(event.self_cpu_time_total / total, 4), "calls": event.count}
        for event in events[:10]
    ]


def train_plain(recipe: Recipe, data: str, runtime: Runtime, *, seconds: float, rate: float = 1e-3) -> dict[str, Any]:
    """Train the peer on prepared data for so long, with warm-up and cosine as ours, and evaluate it as ours."""
    tokenizer = Tokenizer.load(data)
    shards = {split: TokenShards.open(data, split, tokenizer.fingerprint) for split in ("train", "validation")}
    model_config = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    model = PlainGPT(model_config).to(runtime.device)
    optimizer = plain_optimizer(model, rate)
    loader = PackedLoader(shards["train"], recipe.tokens_per_step, model_config.context, seed=0)
    schedule, steps, begin = ScheduleConfig(), 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        batch = next(loader).to(runtime.device)
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(schedule, elapsed / seconds)
        rows = batch.tokens.view(-1, model_config.context), batch.targets.view(-1, model_config.context)
        model.row_loss(*rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
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
