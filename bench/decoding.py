"""Generation, ours and transformers' in one process and on the same weights: time to the first token, and tokens per
second from there on. All sequences of a batch are equally long. The weights are random, not trained: speed does not
depend on them, but the greedy tokens have to be the same.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import harness
from bench.harness import Figures, copy_bandwidth, in_turn, outcome
from bench.llama_cpp import Clock, llama_cpp
from engine.batcher import Batcher, Request
from engine.config import ModelConfig
from engine.huggingface import their_config, their_tensors
from engine.model import GPT
from engine.runtime import Runtime, wall_seconds
from engine.sampling import Sampling

Prompts = Sequence[Sequence[int]]  # [B, T]
# It turns prompts into new tokens, as many as are asked for.
Generate = Callable[[Prompts, int], list[list[int]]]


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
    """Return what shows how the cost grows: with the batch, at half of the context, and with the context."""
    new, half = 32, config.context // 2
    lengths = range(2 * new, config.context + 1, max(config.context // 8, 1))
    return [
        *(Size(threads, 2**power, half, new, sweep="batch") for power in range(7)),
        *(Size(threads, 8, length - new, new, sweep="context") for length in lengths),
    ]


def ours(model: GPT, runtime: Runtime, temperature: float, **options: Any) -> Generate:
    @cache  # as in a server, where it lives as long as the model
    def batcher_of(slots: int, threads: int) -> Batcher:
        return Batcher(model, slots=slots, **options)

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        batcher, sampling = batcher_of(len(prompts), torch.get_num_threads()), Sampling(temperature=temperature)
        tokens: dict[int, list[int]] = {batcher.submit(Request(prompt, sampling, new)): [] for prompt in prompts}
        while not batcher.idle:
            for step in batcher.step():
                tokens[step.request].append(step.token)
        return list(tokens.values())

    return generate


def transformers(model: GPT, runtime: Runtime, temperature: float) -> Generate:
    import transformers
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(their_config(model.config)))
        save_file(their_tensors(model), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        peer: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=runtime.dtype)
        peer = peer.to(runtime.device)

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        tokens = torch.tensor(prompts, device=runtime.device)
        options: dict[str, Any] = {
            "max_new_tokens": new,
            "do_sample": temperature > 0,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        if temperature:
            options |= {"temperature": temperature, "top_k": 0}
        with torch.inference_mode():
            whole = peer.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return whole[:, tokens.shape[1] :].tolist()

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
            tokens[name] = made(name)(prompts, size.new)
            return {}

        found = {name: outcome(warm_up, name) for name in providers}
        longs = torch.randint(config.vocab_size, (size.batch, size.long)).tolist()
        clocks = {name: partial(outcome, clock, made(name), prompts, longs, size, runtime) for name in tokens}
        if peer is not None:
            clocks["llama.cpp"] = partial(outcome, clock_program, peer, size)
        found |= in_turn(clocks, rounds)
        # A step reads at least all weights, and the keys and values of half a sequence more than the prompt.
        cached = 2 * config.blocks * config.width * size.batch * (size.prompt + size.new // 2)
        read = config.matmul_parameters * weight + cached * number
        point: Figures = {**size._asdict(), "bytes_per_step": read}
        for name, seconds in found.items():
            point[name] = seconds
            if "reason" in seconds:
                continue
            rate = size.batch * (size.new - 1) / seconds["others"]
            point[name] = {
                "tokens_per_second": rate,
                "first_token_seconds": seconds["first"],
                "bandwidth_share": rate / size.batch * read / bandwidth(size.threads),
            }
            if size.long:
                point[name]["long_first_token_seconds"] = seconds["long"]
            if name in tokens and not temperature:
                point[name]["same_tokens"] = same_tokens(tokens[name], next(iter(tokens.values())))
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
    def seconds(prompts: Prompts, new: int) -> float:
        return wall_seconds(partial(generate, prompts, new), runtime.device)

    first, whole = seconds(prompts, 1), seconds(prompts, size.new)
    return {"first": first, "others": whole - first, **({"long": seconds(longs, 1)} if size.long else {})}


def clock_program(peer: Clock, size: Size) -> Figures:
    threads, batch, prompt, new = size[:4]
    return peer(threads, batch, prompt, new) | (
        {"long": peer(threads, batch, size.long, 1)["first"]} if size.long else {}
    )


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
