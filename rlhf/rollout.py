"""Rollouts: answers that a policy draws, and their log-probabilities under a model.

The batcher that serves users draws the answers, from the whole distribution. What a model makes of them is computed
from packed sequences: neither padding nor the logits of all tokens at once are ever in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from engine.batcher import Batcher, Request
from engine.model import GPT
from engine.progress import listener
from engine.runtime import inference
from engine.sampling import Sampling
from kernels import linear_log_probs
from rlhf.prompts import Prompt
from train.data.loader import IGNORE_INDEX, Batch, pack

# How many answers are drawn at a time: on a GPU the more the faster, as far as their keys and values find room (in
# bytes, there as a share of its memory). A CPU is as fast from eight on, and takes long to clear a large cache.
SLOTS, CPU_SLOTS = 256, 64
CPU_CACHE, GPU_SHARE = 2**31, 8
# How many tokens of prompts are read at a time: unlike in a server, nobody waits for the next word meanwhile.
CHUNK = 8192


@dataclass(frozen=True)
class Rollout:
    """Prompts and their answers: token ids with the end token, where they `ended` with one.

    `sampled` holds the log-probabilities [tokens of all answers] that the sampler saw, at temperature 1.
    """

    prompts: Sequence[Prompt]
    answers: list[list[int]]
    ended: Tensor
    sampled: Tensor

    @property
    def mask(self) -> Tensor:
        """Return the tokens of each answer, bool [B, T], on the CPU."""
        lengths = torch.tensor([len(answer) for answer in self.answers])
        return torch.arange(int(lengths.max())) < lengths[:, None]

    @property
    def input_lengths(self) -> list[int]:
        """Return the number of tokens that a model reads of each prompt with its answer."""
        return [len(prompt.ids) + len(answer) - 1 for prompt, answer in zip(self.prompts, self.answers, strict=True)]


def roll_out(
    model: GPT,
    prompts: Sequence[Prompt],
    ends: frozenset[int],
    *,
    each: int = 1,
    temperature: float = 1.0,
    max_tokens: int | None = None,
    seed: int = 0,
    first: int = 0,
) -> Rollout:
    """Draw `each` answers to each prompt from softmax(logits / temperature), up to one of `ends` or max_tokens.

    The rollout has each prompt as often as there are answers to it, one after the other. An answer depends on the seed
    and on its number; the first has number `first`.
    """
    prompts = [prompt for prompt in prompts for _ in range(each)]
    sampling = Sampling(temperature=temperature, seed=seed)
    batcher = Batcher(model, slots=min(len(prompts), most_slots(model)), queue=len(prompts), chunk=CHUNK)
    most = max_tokens or model.config.context
    numbers = {
        batcher.submit(Request(prompt.ids, sampling.of_row(first + row), most, ends, top_logprobs=0)): row
        for row, prompt in enumerate(prompts)
    }
    answers: list[list[int]] = [[] for _ in prompts]
    sampled: list[list[float]] = [[] for _ in prompts]
    whole = 0
    # A policy is in training: to change its mode at each step would take as long as the rest of the step.
    with inference(model), listener.get()("drawing answers", len(prompts), "answers") as told:
        while not batcher.idle:
            for step in batcher.step():
                assert step.logprob is not None
                answers[numbers[step.request]].append(step.token)
                sampled[numbers[step.request]].append(step.logprob)
                whole += step.finish is not None
            told(whole)
    ended = torch.tensor([answer[-1] in ends for answer in answers])
    return Rollout(prompts, answers, ended, torch.tensor([log_prob for own in sampled for log_prob in own]))


def most_slots(model: GPT) -> int:
    """Return how many answers are drawn together.

    It is the same for every run on a machine: among other answers, one may differ in its last bits.
    """
    config, weight = model.config, model.embedding.weight
    most, room = CPU_SLOTS, CPU_CACHE
    if weight.device.type == "cuda":
        most, room = SLOTS, torch.cuda.get_device_properties(weight.device).total_memory // GPU_SHARE
    size = (model.compute_dtype or weight.dtype).itemsize
    return max(1, min(most, room // (2 * config.cached * config.context * size)))


def rollout_log_probs(model: GPT, rollout: Rollout, temperature: float, tokens_per_pass: int) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every token of the answers, and the entropy where it was drawn.

    Both are in nats, fp32 [tokens], on the CPU.
    """
    # PPO and GRPO compare the policy with what it was when it drew the answers. Those old log-probabilities are
    # computed again by this function, although the sampler knows them: it reads keys and values from a cache and
    # rounds differently, and a ratio that is not 1 before the first step would count as a change of the policy.
    log_probs, entropies = map_rollout(
        model, rollout, tokens_per_pass, lambda batch: answer_log_probs(model, batch, temperature)
    )
    return log_probs, entropies


def map_rollout(
    model: GPT, rollout: Rollout, tokens_per_pass: int, compute: Callable[[Batch], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Compute something for all tokens of the answers, as many at a time as a pass holds: [tokens] each, on the CPU."""
    found, device = [], model.embedding.weight.device
    with inference(model):
        for rows in split_by_tokens(rollout.input_lengths, tokens_per_pass):
            part = slice(rows.start, rows.stop)
            prompts = [prompt.ids for prompt in rollout.prompts[part]]
            batch = pack_answers(prompts, rollout.answers[part], model.config.context)
            found.append([each.cpu() for each in compute(batch.to(device))])
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def split_by_tokens(sizes: Sequence[int], tokens_per_pass: int) -> Iterator[range]:
    """Yield the numbers of sequences in order, in groups of at most this many tokens (or a single longer sequence)."""
    first = held = 0
    with listener.get()("reading answers", len(sizes), "answers") as told:
        for number, size in enumerate(sizes):
            if held and held + size > tokens_per_pass:
                yield range(first, number)
                told(number)
                first, held = number, 0
            held += size
        if held:
            yield range(first, len(sizes))


def pack_answers(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], context: int) -> Batch:
    """Pack prompts (at least a token each) with their answers, whose tokens alone are targets."""
    sequences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = np.array([*prompt, *answer])
        targets = ids[1:].copy()
        targets[: len(prompt) - 1] = IGNORE_INDEX
        sequences.append((ids[:-1], targets))
    return pack(sequences, context)


def target_answers(batch: Batch, header: Sequence[int]) -> Batch:
    """Make the last answers of packed conversations, whole ones, the only targets.

    An answer begins after the last `header`, which no text spells.
    """
    bounds, tokens = batch.cu_seqlens, batch.tokens
    positions = torch.arange(len(tokens), device=tokens.device)
    sequence = torch.bucketize(positions, bounds[1:], right=True)
    begins = torch.zeros(len(bounds) - 1, dtype=torch.int64, device=tokens.device)
    found = torch.stack([tokens.roll(before) == each for before, each in enumerate(reversed(header))]).all(0)
    begins = begins.scatter_reduce(0, sequence, positions * found, "amax")
    targets = tokens.roll(-1).masked_fill(positions < begins[sequence], IGNORE_INDEX)
    targets[bounds[1:].long() - 1] = IGNORE_INDEX
    return replace(batch, targets=targets)


def answer_log_probs(model: GPT, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every target of a batch and the entropy where it was drawn.

    Both are in nats, fp32 [targets], of softmax(logits / temperature), as answers are drawn. Gradients flow.
    """
    learnt = batch.targets != IGNORE_INDEX
    hidden = model(batch.tokens, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
    return linear_log_probs(hidden[learnt], model.head_weight, batch.targets[learnt], temperature)


def sequence_log_probs(model: GPT, batch: Batch) -> Tensor:
    """Return the summed log-probability of all targets of each sequence, in nats. fp32 [sequences], gradients flow."""
    log_probs, _ = answer_log_probs(model, batch)
    positions = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
    sequence = torch.bucketize(positions, batch.cu_seqlens[1:], right=True)
    return torch.zeros(len(batch.cu_seqlens) - 1, device=log_probs.device).index_add(0, sequence, log_probs)


def to_rows(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Return values of all answers end to end [N] as rows [B, T], 0 where the mask is False. Gradients flow."""
    return torch.zeros(mask_BT.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(mask_BT, values_N)


def answer_kl(per_token_N: Tensor, mask_BT: Tensor) -> float:
    """Return the mean over answers of the sum over their tokens: nats per answer."""
    return float(to_rows(per_token_N, mask_BT).sum(dim=1).mean())


def describe_answers(rollout: Rollout) -> dict[str, float]:
    """Measure what changes when a policy games its reward: the length of answers, whether they end, and repetition."""
    lengths = [len(answer) for answer in rollout.answers]
    pairs = [pair for answer in rollout.answers for pair in pairwise(answer)]
    return {
        "length": sum(lengths) / len(lengths),
        "ended": float(rollout.ended.float().mean()),
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),
    }
