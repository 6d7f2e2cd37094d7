"""Generation, ours and transformers' in one process and on the same weights: time to the first token, and tokens per
second from there on. All sequences of a batch are equally long. The weights are random, not trained: speed does not
depend on them, but the greedy tokens have to be the same.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import harness
from bench.harness import Figures, copy_bandwidth, in_turn, outcome
from bench.llama_cpp import Clock, llama_cpp
from engine.batcher import Batcher, Request
from engine.config import ModelConfig
from engine.families import their_config, their_tensors
from engine.model import GPT
from engine.runtime import Runtime, synchronize, wall_seconds
from engine.sampling import Sampling

Prompts = Sequence[Sequence[int]]  # [B, T]


class Generated(NamedTuple):
    """New tokens, when every sequence had its first one, in seconds, and how many there were by then."""

    tokens: list[list[int]]
    begun: float
    by_then: int


# It turns prompts into new tokens, as many as are asked for.
Generate = Callable[[Prompts, int], Generated]


class Size(NamedTuple):
    """Each of `batch` prompts gets `new` tokens; `long`, if not 0, is another prompt, of which the first one counts."""

    threads: int
    batch: int
    prompt: int
    new: int
    long: int = 0
    sweep: str = ""


def table(config: ModelConfig, threads: int, batches: Sequence[int]) -> list[Size]:
    """Return a prompt of an eighth of the context and new tokens for three quarters of it, for each batch."""
    eighth = config.context // 8
    return [Size(threads, batch, eighth, 6 * eighth, config.context * 25 // 32) for batch in batches]


def sweeps(config: ModelConfig, threads: int) -> list[Size]:
    """Return what shows how the cost grows: with the batch, and with the context at a batch of 8."""
    new, eighth = 32, config.context // 8
    lengths = range(2 * new, config.context + 1, eighth)
    return [
        *(Size(threads, 2**power, eighth, 2 * eighth, sweep="batch") for power in range(7)),
        *(Size(threads, 8, length - new, new, sweep="context") for length in lengths),
    ]


def ours(model: GPT, runtime: Runtime, temperature: float, **options: Any) -> Generate:
    @cache  # as in a server, where it lives as long as the model
    def batcher_of(slots: int, threads: int) -> Batcher:
        return Batcher(model, slots=slots, **options)

    def generate(prompts: Prompts, new: int) -> Generated:
        batcher, sampling = batcher_of(len(prompts), torch.get_num_threads()), Sampling(temperature=temperature)
        tokens: dict[int, list[int]] = {batcher.submit(Request(prompt, sampling, new)): [] for prompt in prompts}
        begun, by_then = None, 0
        while not batcher.idle:
            for step in batcher.step():
                tokens[step.request].append(step.token)
            if begun is None and all(tokens.values()):
                begun, by_then = time.perf_counter(), sum(map(len, tokens.values()))
        return Generated(list(tokens.values()), begun or 0.0, by_then)

    return generate


def transformers(model: GPT, runtime: Runtime, temperature: float) -> Generate:
    import transformers
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(their_config(model.config)))
        save_file(their_tensors(model), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        peer: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=runtime.dtype)
        peer = peer.to(runtime.device)

    def generate(prompts: Prompts, new: int) -> Generated:
        times: list[float] = []

        def watch(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            """Note when tokens come, and stop no sequence."""
            if not times:
                synchronize(runtime.device)
                times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        tokens = torch.tensor(prompts, device=runtime.device)
        options: dict[str, Any] = {
            "max_new_tokens": new,
            "do_sample": temperature > 0,
            "eos_token_id": None,
            "pad_token_id": 0,
            "stopping_criteria": [watch],
        }
        if temperature:
            options |= {"temperature": temperature, "top_k": 0}
        with torch.inference_mode():
            whole = peer.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return Generated(whole[:, tokens.shape[1] :].tolist(), times[0], len(prompts))

    return generate


PROVIDERS: dict[str, Callable[[GPT, Runtime, float], Generate]] = {
    "transformers": transformers,
    "ours": ours,
    "without graphs": partial(ours, graphs=False),
}


def bench_decoding(
    config: ModelConfig,
    runtime: Runtime,
    sizes: Sequence[Size],
    *,
    providers: Sequence[str],
    rounds: int,
    temperature: float = 0.0,
    program: Path | None = None,
) -> Iterator[Figures]:
    """Yield the result so far after every size. `program`: a llama-batched-bench, which takes turns with the providers.

    Who cannot run has a reason. At temperature 0 tokens are compared with those of the first who can. Raises InputError
    for a program that cannot run.
    """
    torch.manual_seed(0)
    with runtime.device:  # to draw the weights of large takes a CPU five seconds
        model = GPT(config).to(dtype=runtime.dtype).eval()
    model.decode_int8 = runtime.precision == "int8"
    bandwidth = cache(lambda threads: copy_bandwidth(runtime.device))
    made = cache(lambda name: PROVIDERS[name](model, runtime, temperature))
    # The bytes of a weight, and of a key or a value.
    number = model.embedding.weight.element_size()
    weight = 1 if model.decode_int8 else number

    def measured(size: Size, peer: Clock | None) -> Figures:
        prompts = torch.randint(config.vocab_size, (size.batch, size.prompt)).tolist()
        tokens: dict[str, list[list[int]]] = {}

        def warm_up(name: str) -> Figures:
            tokens[name] = made(name)(prompts, size.new).tokens
            return {}

        found = {name: outcome(warm_up, name) for name in providers}
        longs = torch.randint(config.vocab_size, (size.batch, size.long)).tolist()
        clocks = {name: partial(outcome, clock, made(name), prompts, longs, size, runtime) for name in tokens}
        if peer is not None:
            clocks["llama.cpp"] = partial(outcome, clock_program, peer, size)
        found |= in_turn(clocks, rounds)
        # A step reads at least all weights, and the keys and values of half a sequence more than the prompt.
        cached = config.cached * size.batch * (size.prompt + size.new // 2)
        read = config.matmul_parameters * weight + cached * number
        point: Figures = {**size._asdict(), "bytes_per_step": read}
        for name, figures in found.items():
            if "reason" not in figures:
                rate = figures["tokens_per_second"] / size.batch
                figures["bandwidth_share"] = rate * read / bandwidth(size.threads)
                if name in tokens and not temperature:
                    figures["same_tokens"] = same_tokens(tokens[name], next(iter(tokens.values())))
            point[name] = figures
        return point

    points: list[Figures] = []
    with llama_cpp(program, model, runtime.precision) if program else nullcontext() as peer:
        for size in sizes:
            with torch_threads(size.threads):
                points.append(measured(size, peer))
            yield {"rounds": rounds, "temperature": temperature, "points": points}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clock(generate: Generate, prompts: Prompts, longs: Prompts, size: Size, runtime: Runtime) -> Figures:
    generate(prompts, 1)  # as llama.cpp is warmed up: after a rest, threads and caches are cold
    first = {"first_token_seconds": prompts, "long_first_token_seconds": longs if size.long else []}
    seconds = {name: wall_seconds(partial(generate, each, 1), runtime.device) for name, each in first.items() if each}
    generated = generate(prompts, size.new)
    rest = size.batch * size.new - generated.by_then
    return {"tokens_per_second": rest / (time.perf_counter() - generated.begun), **seconds}


def clock_program(peer: Clock, size: Size) -> Figures:
    threads, batch, prompt, new = size[:4]
    first, others = peer(threads, batch, prompt, new)
    found = {"tokens_per_second": batch * (new - 1) / others, "first_token_seconds": first}
    return found | ({"long_first_token_seconds": peer(threads, batch, size.long, 1)[0]} if size.long else {})


def same_tokens(these: list[list[int]], those: list[list[int]]) -> float:
    """Return the share of tokens before the first difference of each sequence."""
    pairs = [zip(one, other, strict=True) for one, other in zip(these, those, strict=True)]
    same = sum(len(list(takewhile(lambda pair: pair[0] == pair[1], each))) for each in pairs)
    return same / sum(map(len, these))


def draw(points: Sequence[Figures], title: str, path: Path) -> None:
    """Draw the points of the sweeps: a row for each of them, a column for each number of threads."""
    threads = sorted({point["threads"] for point in points})
    panels = []
    for sweep, about in (("batch", "context {context}"), ("context", "batch {batch}")):
        for count in threads:
            mine = [
                point | {"context": point["prompt"] + point["new"]}
                for point in points
                if point["sweep"] == sweep and point["threads"] == count
            ]
            lines = harness.lines_of(mine, sweep, "tokens_per_second")
            panels.append(harness.Panel(f"{about.format(**mine[0])}, threads {count}", sweep, lines))
    harness.draw(panels, len(threads), title, "tokens/s", path)
