"""Log-probabilities of answers under a model, from packed sequences: the logits are never whole."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.model import GPT
from kernels import linear_log_probs
from train.data.loader import IGNORE_INDEX, Batch, pack


def pack_answers(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], context: int) -> Batch:
    """Prompts (a token at least) and their answers end to end, the answers' tokens as targets and nothing else."""
    sequences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = np.array([*prompt, *answer])
        targets = ids[1:].copy()
        targets[: len(prompt) - 1] = IGNORE_INDEX
        sequences.append((ids[:-1], targets))
    return pack(sequences, context)


def answer_log_probs(model: GPT, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of every target of a batch and the entropy where it was drawn, in nats, fp32 [targets].

    Of softmax(logits / temperature): the temperature that the answers were drawn at. Gradients flow.
    """
    learnt = batch.targets != IGNORE_INDEX
    hidden = model(batch.tokens, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
    return linear_log_probs(hidden[learnt], model.head.weight, batch.targets[learnt], temperature)


def target_answers(batch: Batch, assistant: int) -> Batch:
    """The same sequences, whole conversations, with the tokens of their last answers as targets and nothing else.

    No text spells the piece `assistant`: where it stands last, the answer begins.
    """
    bounds, tokens = batch.cu_seqlens, batch.tokens
    places = torch.arange(len(tokens), device=tokens.device)
    sequence = torch.bucketize(places, bounds[1:], right=True)
    begins = torch.zeros(len(bounds) - 1, dtype=torch.int64, device=tokens.device)
    begins = begins.scatter_reduce(0, sequence, places * (tokens == assistant), "amax")
    targets = tokens.roll(-1).masked_fill(places < begins[sequence], IGNORE_INDEX)
    targets[bounds[1:].long() - 1] = IGNORE_INDEX
    return replace(batch, targets=targets)


def sequence_log_probs(model: GPT, batch: Batch) -> Tensor:
    """The log-probability of all targets of each sequence, summed, in nats. fp32 [sequences], gradients flow."""
    log_probs, _ = answer_log_probs(model, batch)
    places = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
    sequence = torch.bucketize(places, batch.cu_seqlens[1:], right=True)
    return torch.zeros(len(batch.cu_seqlens) - 1, device=log_probs.device).index_add(0, sequence, log_probs)


def to_rows(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Values of all answers end to end [N] as rows [B, T], 0 where the mask is False. Gradients flow."""
    return torch.zeros(mask_BT.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(mask_BT, values_N)


def mask_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """True at the first `length` places of each row, bool [B, T]."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
