"""Rollouts: answers that a policy draws, from the batcher that serves users, with nothing cut off its distribution."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from engine.batcher import Batcher, Request
from engine.model import GPT
from engine.runtime import inference
from engine.sampling import Sampling
from rlhf.log_probs import answer_log_probs, mask_of, pack_answers, to_rows
from rlhf.rewards import Prompt
from train.data.loader import Batch

# How far the sampler's log-probabilities may be from the trainer's in fp32: on average, and anywhere.
TOLERANCE = 1e-5
WORST = 1e-4
# Answers drawn at a time: the more the faster, as far as their keys and values find room (in bytes, and on a GPU as a
# share of its memory).
SLOTS = 256
CPU_CACHE, GPU_SHARE = 2**31, 8
# Tokens of prompts read at a time: nobody waits for the next word meanwhile, as in a server.
CHUNK = 8192


@dataclass(frozen=True)
class Rollout:
    """Prompts and their answers: token ids with the end piece, where they `ended` with one.

    `sampled` holds the log-probabilities [tokens of all answers] that the sampler saw, at temperature 1.
    """

    prompts: Sequence[Prompt]
    answers: list[list[int]]
    ended: Tensor
    sampled: Tensor

    @property
    def mask(self) -> Tensor:
        """The tokens of each answer, bool [B, T], on the CPU."""
        return mask_of([len(answer) for answer in self.answers])


def roll_out(
    model: GPT,
    prompts: Sequence[Prompt],
    ends: frozenset[int],
    *,
    temperature: float = 1.0,
    max_tokens: int | None = None,
    seed: int = 0,
    first: int = 0,
    progress: Callable[[int, int], None] = lambda answers, tokens: None,
) -> Rollout:
    """One answer to each prompt, drawn from softmax(logits / temperature), up to one of `ends` or max_tokens.

    An answer depends on the seed and on its number; the first has number `first`. `progress` hears now and then how
    many answers are whole, and how many tokens there are.
    """
    sampling = Sampling(temperature=temperature, seed=seed)
    batcher = Batcher(model, slots=min(len(prompts), most_slots(model)), queue=len(prompts), chunk=CHUNK)
    most = max_tokens or model.config.context
    numbers = {
        batcher.submit(Request(prompt.ids, sampling.of_row(first + row), most, ends, top_logprobs=0)): row
        for row, prompt in enumerate(prompts)
    }
    answers: list[list[int]] = [[] for _ in prompts]
    sampled: list[list[float]] = [[] for _ in prompts]
    whole = tokens = 0
    while not batcher.idle:
        for step in batcher.step():
            assert step.logprob is not None
            answers[numbers[step.request]].append(step.token)
            sampled[numbers[step.request]].append(step.logprob)
            whole, tokens = whole + (step.finish is not None), tokens + 1
        progress(whole, tokens)
    ended = torch.tensor([answer[-1] in ends for answer in answers])
    return Rollout(prompts, answers, ended, torch.tensor([each for own in sampled for each in own]))


def most_slots(model: GPT) -> int:
    """The same for every run on a machine: what is drawn together may differ in its last bits."""
    config, weight = model.config, model.embedding.weight
    room = CPU_CACHE
    if weight.device.type == "cuda":
        room = torch.cuda.get_device_properties(weight.device).total_memory // GPU_SHARE
    size = (model.compute_dtype or weight.dtype).itemsize
    return max(1, min(SLOTS, room // (4 * config.blocks * config.width * config.context * size)))


def rollout_log_probs(model: GPT, rollout: Rollout, temperature: float, tokens_per_pass: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all answers' tokens under a model, and entropies there. fp32 [tokens] each, on the CPU."""
    log_probs, entropies = [], []
    with inference(model):
        for part in passes(rollout, tokens_per_pass):
            batch = pack_part(rollout, part, model.config.context)
            found, entropy = answer_log_probs(model, batch.to(model.embedding.weight.device), temperature)
            log_probs.append(found.cpu())
            entropies.append(entropy.cpu())
    return torch.cat(log_probs), torch.cat(entropies)


def passes(rollout: Rollout, tokens_per_pass: int) -> Iterator[range]:
    """Rows of a rollout in order, as many at a time as hold so many tokens (one at least)."""
    first = held = 0
    for row, (prompt, answer) in enumerate(zip(rollout.prompts, rollout.answers, strict=True)):
        size = len(prompt.ids) + len(answer) - 1
        if held and held + size > tokens_per_pass:
            yield range(first, row)
            first, held = row, 0
        held += size
    yield range(first, len(rollout.answers))


def pack_part(rollout: Rollout, rows: range, context: int) -> Batch:
    """These rows of a rollout, end to end."""
    return pack_answers([rollout.prompts[row].ids for row in rows], [rollout.answers[row] for row in rows], context)


def describe_answers(rollout: Rollout) -> dict[str, float]:
    """What a policy does that games its reward: shorter or longer answers, without an end, that repeat themselves."""
    lengths = [len(answer) for answer in rollout.answers]
    pairs = [pair for answer in rollout.answers for pair in pairwise(answer)]
    return {
        "length": sum(lengths) / len(lengths),
        "ended": float(rollout.ended.float().mean()),
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),
    }


def answer_kl(per_token_N: Tensor, mask_BT: Tensor) -> float:
    """The mean over answers of the sum over their tokens: nats per answer."""
    return float(to_rows(per_token_N, mask_BT).sum(dim=1).mean())
