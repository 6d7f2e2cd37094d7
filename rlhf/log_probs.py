"""Log-probabilities of answers under a model, from packed sequences: the logits are never whole."""

from collections.abc import Sequence

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


def to_rows(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Values of all answers end to end [N] as rows [B, T], 0 where the mask is False. Gradients flow."""
    return torch.zeros(mask_BT.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(mask_BT, values_N)


def mask_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """True at the first `length` places of each row, bool [B, T]."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
