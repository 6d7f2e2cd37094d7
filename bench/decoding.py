"""Generation, ours and transformers' in one process and on the same weights: time to the first token, and tokens per
second from there on. Greedy, all sequences of a batch equally long. The weights are drawn, not trained: speed does not
depend on them, but the tokens have to be the same.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.timing import copy_bandwidth
from engine.batcher import Batcher, Request
from engine.config import ModelConfig
from engine.huggingface import their_config, their_tensors
from engine.model import GPT
from engine.runtime import Runtime, synchronize
from engine.sampling import Sampling

BATCHES = (1, 8, 32)

# From prompts [B, T], new tokens [B, so many as are asked for].
Generate = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


def ours(model: GPT, runtime: Runtime, **options: Any) -> Generate:
    # As in a server, where it lives as long as the model.
    batchers: dict[int, Batcher] = {}

    def generate(prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        if (slots := len(prompts)) not in batchers:
            batchers[slots] = Batcher(model, slots=slots, **options)
        batcher = batchers[slots]
        tokens: dict[int, list[int]] = {
            batcher.submit(Request(prompt, Sampling(temperature=0), new)): [] for prompt in prompts
        }
        while not batcher.idle:
            for step in batcher.step():
                tokens[step.request].append(step.token)
        return list(tokens.values())

    return generate


def without_graphs(model: GPT, runtime: Runtime) -> Generate:
    return ours(model, runtime, graphs=False)


def transformers(model: GPT, runtime: Runtime) -> Generate:
    import transformers
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(their_config(model.config)))
        save_file(their_tensors(model), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        peer: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=runtime.dtype)
        peer = peer.to(runtime.device)

    def generate(prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        tokens = torch.tensor(prompts, device=runtime.device)
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            whole = peer.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return whole[:, tokens.shape[1] :].tolist()

    return generate


PROVIDERS: dict[str, Callable[[GPT, Runtime], Generate]] = {
    "transformers": transformers,
    "ours": ours,
    "without graphs": without_graphs,
}


def bench_decoding(
    config: ModelConfig, runtime: Runtime, *, batches: Sequence[int], providers: Sequence[str], rounds: int
) -> Iterator[dict[str, Any]]:
    """One point for each batch: a prompt of an eighth of the context, and new tokens for three quarters of it."""
    torch.manual_seed(0)
    model = GPT(config).to(device=runtime.device, dtype=runtime.dtype).eval()
    model.decode_int8 = runtime.precision == "int8"
    bandwidth = copy_bandwidth(runtime.device)
    made = {name: PROVIDERS[name](model, runtime) for name in providers}
    prompt, new = config.context // 8, config.context * 3 // 4
    for batch in batches:
        prompts = torch.randint(config.vocab_size, (batch, prompt)).tolist()
        tokens = {name: generate(prompts, new) for name, generate in made.items()}  # and all is warm
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
        for _ in range(rounds):
            for name, generate in made.items():
                seconds[name].append(tuple(_seconds(generate, prompts, each, runtime) for each in (1, new)))  # type: ignore[arg-type]
        # What a step reads, at the least: all weights, and the keys and values of half a sequence more than the prompt.
        cached = 2 * config.blocks * config.width * batch * (prompt + new // 2)
        read = (config.matmul_parameters + cached) * model.embedding.weight.element_size()
        point: dict[str, Any] = {"batch": batch, "prompt": prompt, "new": new, "bytes_per_step": read}
        for name in made:
            first = median(one for one, _ in seconds[name])
            rate = batch * (new - 1) / median(whole - one for one, whole in seconds[name])
            point[name] = {
                "tokens_per_second": rate,
                "first_token_seconds": first,
                "bandwidth_share": rate / batch * read / bandwidth,
                "same_tokens": _same(tokens[name], tokens[providers[0]]),
            }
        yield point


def _seconds(generate: Generate, prompts: Sequence[Sequence[int]], new: int, runtime: Runtime) -> float:
    synchronize(runtime.device)
    begin = time.perf_counter()
    generate(prompts, new)
    return time.perf_counter() - begin


def _same(these: list[list[int]], those: list[list[int]]) -> float:
    """The share of tokens before the first difference of each sequence."""
    same = total = 0
    for one, other in zip(these, those, strict=True):
        same += next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        total += len(one)
    return same / total
