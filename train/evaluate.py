"""How good a model is on what it has not seen: loss, perplexity, bits per byte; the stories it writes on request."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from engine.chat_template import Message, answer_prompt, text_ends
from engine.generate import document_prompt, generate
from engine.model import GPT
from engine.runtime import inference
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from train.data.loader import IGNORE_INDEX, Batch, TokenSource, pack
from train.data.stories import StoryRequest, StoryScore, score_story


def evaluate_loss(
    model: GPT, documents: TokenSource, byte_lengths: np.ndarray, *, tokens: int, tokens_per_batch: int
) -> dict[str, float]:
    """Loss over the first documents that hold `tokens` tokens, each read from its start, whole.

    A document longer than the context is read in pieces that do not see one another. Bits per byte count the UTF-8
    bytes that the targets spell (byte_lengths [vocab]); unlike the loss, they compare across tokenizers. The result
    does not depend on tokens_per_batch, which bounds what is read at a time (a piece at least).
    """
    device = model.embedding.weight.device
    nats = 0.0
    targets = text_bytes = 0
    with inference(model):
        for batch in whole_pieces(documents, model.config.context, tokens, tokens_per_batch):
            learnt = batch.targets[batch.targets != IGNORE_INDEX].numpy()
            text_bytes += int(byte_lengths[learnt].sum())
            targets += len(learnt)
            batch = batch.to(device)
            nats += float(
                model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
            )
    loss_per_token = nats / targets
    return {
        "loss": loss_per_token,
        "perplexity": math.exp(min(loss_per_token, 100.0)),
        "bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
        "tokens": targets,
        "bytes": text_bytes,
    }


def whole_pieces(documents: TokenSource, context: int, tokens: int, tokens_per_batch: int) -> Iterator[Batch]:
    """Documents in order, cut only where they exceed the context, in batches of at most tokens_per_batch."""
    lengths = documents.lengths
    count = int(np.searchsorted(lengths.cumsum(), tokens)) + 1
    held: list[tuple[np.ndarray, np.ndarray]] = []
    size = 0
    for document, length in enumerate(lengths[:count].tolist()):
        for start in range(0, length, context):
            piece = documents.read(document, start, min(context, length - start))
            if held and size + len(piece[0]) > tokens_per_batch:
                yield pack(held, context)
                held, size = [], 0
            held.append(piece)
            size += len(piece[0])
    yield pack(held, context)


def score_stories(
    model: GPT, tokenizer: Tokenizer, requests: Sequence[StoryRequest], sampling: Sampling, *, chat: bool
) -> list[StoryScore]:
    """How well the model answers requests for stories. One that knows no chat sees each as the text to go on from."""
    prompts = [
        answer_prompt(tokenizer, [Message("user", request.text)])
        if chat
        else document_prompt(tokenizer, f"{request.text}\n\n")
        for request in requests
    ]
    answers = generate(model, tokenizer, prompts, sampling, stop_ids=text_ends(tokenizer, chat=chat))
    return [score_story(request.facts, answer.text) for request, answer in zip(requests, answers, strict=True)]
