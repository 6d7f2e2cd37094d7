"""Generation, ours and transformers' in one process and on the same weights: time to the first token, and tokens per
second from there on. Greedy, all sequences of a batch equally long. The weights are random, not trained: speed does not
depend on them, but the tokens have to be the same.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from bench.harness import Figures, copy_bandwidth, in_turn, outcome
from engine.batcher import Batcher, Request
from engine.config import ModelConfig
from engine.huggingface import their_config, their_tensors
from engine.model import GPT
from engine.runtime import Runtime, wall_seconds
from engine.sampling import Sampling

Prompts = Sequence[Sequence[int]]  # [B, T]
# It turns prompts into new tokens, as many as are asked for.
Generate = Callable[[Prompts, int], list[list[int]]]


def ours(model: GPT, runtime: Runtime, **options: Any) -> Generate:
    @cache  # as in a server, where it lives as long as the model
    def batcher_of(slots: int) -> Batcher:
        return Batcher(model, slots=slots, **options)

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        batcher, greedy = batcher_of(len(prompts)), Sampling(temperature=0)
        tokens: dict[int, list[int]] = {batcher.submit(Request(prompt, greedy, new)): [] for prompt in prompts}
        while not batcher.idle:
            for step in batcher.step():
                tokens[step.request].append(step.token)
        return list(tokens.values())

    return generate


def transformers(model: GPT, runtime: Runtime) -> Generate:
    import transformers
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(their_config(model.config)))
        save_file(their_tensors(model), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        peer: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=runtime.dtype)
        peer = peer.to(runtime.device)

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        tokens = torch.tensor(prompts, device=runtime.device)
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            whole = peer.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return whole[:, tokens.shape[1] :].tolist()

    return generate


PROVIDERS: dict[str, Callable[[GPT, Runtime], Generate]] = {
    "transformers": transformers,
    "ours": ours,
    "without graphs": partial(ours, graphs=False),
}


def bench_decoding(
    config: ModelConfig, runtime: Runtime, *, batches: Sequence[int], providers: Sequence[str], rounds: int
) -> Iterator[Figures]:
    """Yield a point for each batch: a prompt of an eighth of the context, and new tokens for three quarters of it.

    Who cannot run has a reason. Tokens are compared with those of the first who can.
    """
    torch.manual_seed(0)
    with runtime.device:  # to draw the weights of large takes a CPU five seconds
        model = GPT(config).to(dtype=runtime.dtype).eval()
    model.decode_int8 = runtime.precision == "int8"
    bandwidth = copy_bandwidth(runtime.device)
    made = cache(lambda name: PROVIDERS[name](model, runtime))
    prompt, new = config.context // 8, config.context * 3 // 4
    for batch in batches:
        prompts = torch.randint(config.vocab_size, (batch, prompt)).tolist()
        tokens: dict[str, list[list[int]]] = {}

        def warm_up(name: str, prompts: Prompts = prompts, tokens: dict[str, Any] = tokens) -> Figures:
            tokens[name] = made(name)(prompts, new)
            return {}

        found = {name: outcome(warm_up, name) for name in providers}
        clocks = {name: partial(outcome, clock, made(name), prompts, new, runtime) for name in tokens}
        found |= in_turn(clocks, rounds)
        # A step reads at least all weights, and the keys and values of half a sequence more than the prompt.
        cached = 2 * config.blocks * config.width * batch * (prompt + new // 2)
        read = (config.matmul_parameters + cached) * model.embedding.weight.element_size()
        point: Figures = {"batch": batch, "prompt": prompt, "new": new, "bytes_per_step": read}
        for name, seconds in found.items():
            point[name] = seconds
            if "reason" not in seconds:
                rate = batch * (new - 1) / seconds["others"]
                point[name] = {
                    "tokens_per_second": rate,
                    "first_token_seconds": seconds["first"],
                    "bandwidth_share": rate / batch * read / bandwidth,
                    "same_tokens": same_tokens(tokens[name], next(iter(tokens.values()))),
                }
        yield point


def clock(generate: Generate, prompts: Prompts, new: int, runtime: Runtime) -> Figures:
    first, whole = (wall_seconds(partial(generate, prompts, count), runtime.device) for count in (1, new))
    return {"first": first, "others": whole - first}


def same_tokens(these: list[list[int]], those: list[list[int]]) -> float:
    """Return the share of tokens before the first difference of each sequence."""
    pairs = [zip(one, other, strict=True) for one, other in zip(these, those, strict=True)]
    same = sum(len(list(takewhile(lambda pair: pair[0] == pair[1], each))) for each in pairs)
    return same / sum(map(len, these))
