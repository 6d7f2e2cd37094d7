"""Which precision trains faster on this CPU: measured, because what a chip multiplies in hardware may yet be slower."""

import dataclasses
import time
from functools import cache

import torch

from engine.config import ModelConfig
from engine.model import GPT
from engine.runtime import Runtime, cpu_multiplies_bf16
from kernels.backend import backend

# One block of the model is measured, with this many tokens, in two sequences, and at most this many logits. Widths are
# held to a range: a narrower block would be over in so short a time that chance decides, a wider one take seconds.
TOKENS, LOGITS, WIDTHS = 512, 1024, (128, 256)
ROUNDS = 5


def for_training(machine: Runtime, model: ModelConfig) -> tuple[Runtime, str]:
    """Return the machine with the precision in which it trains faster, and a line that says why; "" without a choice.

    A GPU keeps what its hardware multiplies. A CPU without units for bf16, which it would emulate, keeps fp32.
    """
    device = machine.device
    if device.type != "cpu" or machine.precision != "bf16" or backend(device) != "torch":
        return machine, ""
    ratio = bf16_speedup(model)
    precision = "bf16" if ratio > 1 else "fp32"
    return dataclasses.replace(machine, precision=precision), f"{precision}: bf16 trains {ratio:.2f}x as fast as fp32"


def bf16_speedup(model: ModelConfig) -> float:
    """Return how many times as fast as in fp32 this CPU trains in bf16, by steps of a block of this model; 0: emulated.

    It takes a fraction of a second, once in a process and width.
    """
    if not cpu_multiplies_bf16():
        return 0.0
    width = min(max(model.width, WIDTHS[0]), WIDTHS[1])
    head_dim = min(model.head_dim, width)
    heads = width // head_dim
    return _measure(ModelConfig(min(model.vocab_size, LOGITS), heads * head_dim, 1, heads, TOKENS // 2))


@cache
def _measure(block: ModelConfig) -> float:
    # Weights are drawn at random, and must not change what a run draws.
    with torch.random.fork_rng(devices=[]):
        model = GPT(block)
        tokens = torch.randint(block.vocab_size, (TOKENS,))
    ends = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32)
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    # In turn, by one thread and in its own time, so that other programs hardly matter. The first round is a warm-up.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(1 + ROUNDS):
        for dtype, taken in times.items():
            model.compute_dtype = dtype
            begin = time.thread_time()
            torch.autograd.backward(model.loss(tokens, tokens, cu_seqlens=ends, max_seqlen=TOKENS // 2))
            taken.append(time.thread_time() - begin)
            model.zero_grad()
    torch.set_num_threads(threads)
    return min(times[torch.float32][1:]) / min(times[torch.bfloat16][1:])
