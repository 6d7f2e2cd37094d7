"""How fast this CPU trains a model: by steps of models of about its size. Small ones reach less of the CPU's peak."""

import math
import statistics
import time
from bisect import bisect
from functools import cache

import torch

from engine import laws
from engine.model import GPT
from engine.runtime import Runtime

# Models of so many blocks are timed, each with these rows: larger ones would take seconds, and are as fast.
DEPTHS, ROWS = (2, 3, 4, 6, 8), 8
# So many steps are timed after a first one, or as many as fill these seconds.
ROUNDS, SECONDS = 3, 1.0


def training_flops(machine: Runtime, flops_per_token: float) -> float:
    """Return the FLOP/s of forward and backward pass of a model of so many FLOPs a token, between those timed."""
    work = [laws.shape(depth).flops_per_token for depth in DEPTHS]
    after = bisect(work, flops_per_token)
    if after in (0, len(work)):
        return _timed(machine, DEPTHS[max(0, after - 1)])
    low, high = (_timed(machine, depth) for depth in DEPTHS[after - 1 : after + 1])
    share: float = math.log(flops_per_token / work[after - 1], work[after] / work[after - 1])
    return low * math.pow(high / low, share)


@cache
def _timed(machine: Runtime, depth: int) -> float:
    """Return the FLOP/s of steps of so many blocks, the median of a few. What a run draws at random stays as it is."""
    model = laws.shape(depth)
    tokens = ROWS * model.context
    ends = torch.arange(0, tokens + 1, model.context, dtype=torch.int32, device=machine.device)
    with torch.random.fork_rng(devices=[]), machine.device:
        net = GPT(model)
        batch = torch.randint(model.vocab_size, (tokens,))
    net.compute_dtype = machine.dtype
    taken: list[float] = []
    while len(taken) < 1 + ROUNDS and sum(taken[1:]) < SECONDS:
        begin = time.perf_counter()
        torch.autograd.backward(net.loss(batch, batch, cu_seqlens=ends, max_seqlen=model.context))
        taken.append(time.perf_counter() - begin)
    return tokens * model.flops_per_token / statistics.median(taken[1:])
