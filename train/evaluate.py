"""How good a model is on text it has not seen: loss, perplexity, bits per byte."""

import math

import numpy as np
import torch

from engine.model import GPT
from engine.runtime import inference
from train.data.loader import IGNORE_INDEX, PackedLoader, PieceSource


def evaluate_loss(
    model: GPT, documents: PieceSource, byte_lengths: np.ndarray, *, tokens: int, tokens_per_batch: int
) -> dict[str, float]:
    """Loss over the first `tokens` tokens of the documents, each read from its start.

    A document longer than the context is read in pieces that do not see one another. Bits per byte count the UTF-8
    bytes that the targets spell (byte_lengths [vocab]); unlike the loss, they compare across tokenizers.
    """
    loader = PackedLoader(
        documents, tokens_per_batch, model.config.context, seed=0, shuffle=False, epochs=1, prefetch=0
    )
    device = model.embedding.weight.device
    nats = 0.0
    targets = text_bytes = 0
    with inference(model):
        for batch in loader:
            learnt = batch.targets[batch.targets != IGNORE_INDEX].numpy()
            text_bytes += int(byte_lengths[learnt].sum())
            targets += len(learnt)
            batch = batch.to(device)
            loss = model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
            nats += float(loss)
            if targets >= tokens:
                break
    loss_per_token = nats / targets
    return {
        "loss": loss_per_token,
        "perplexity": math.exp(min(loss_per_token, 100.0)),
        "bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
        "tokens": targets,
        "bytes": text_bytes,
    }


def bits_per_byte(nats: float, targets: torch.Tensor, byte_lengths: torch.Tensor) -> float:
    """Bits per UTF-8 byte of a summed loss over these targets (-100 does not count)."""
    spelled = byte_lengths[targets.clamp(min=0)] * (targets != IGNORE_INDEX)
    return nats / math.log(2) / max(int(spelled.sum()), 1)
