"""Loss and bits per byte of held-out text."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.config import ModelConfig
from engine.model import GPT
from engine.tokenizer import Tokenizer
from train.data.shards import TokenShards
from train.evaluation import evaluate_loss


@pytest.fixture
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer.load(prepared / "tokenizer.model")


@pytest.fixture
def shards(prepared: Path) -> TokenShards:
    return TokenShards(prepared, "validation")


def small_model(vocab_size: int, context: int) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(vocab_size=vocab_size, width=16, blocks=1, heads=2, context=context))


@pytest.mark.parametrize("context", [1024, 16])
def test_the_loss_is_that_of_each_document_read_segment_by_segment(
    tokenizer: Tokenizer, shards: TokenShards, context: int
) -> None:
    model = small_model(tokenizer.vocab_size, context)
    nats = count = text_bytes = 0.0
    for number in range(shards.documents):
        ids = torch.from_numpy(shards.document(number).astype("int64"))
        text_bytes += len(tokenizer.decode(ids.tolist()).encode())
        for start in range(0, len(ids) - 1, context):
            segment = ids[start : start + context + 1]
            logits = model.logits(model(segment[None, :-1]))[0].detach()
            nats += float(F.cross_entropy(logits, segment[1:], reduction="sum"))
            count += len(segment) - 1
    result = evaluate_loss(model, shards, tokenizer.byte_lengths, tokens=10**9, tokens_per_batch=100)
    assert result["tokens"] == count and result["bytes"] == text_bytes == shards.bytes
    assert result["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_no_more_is_read_than_asked_for(tokenizer: Tokenizer, shards: TokenShards) -> None:
    model = small_model(tokenizer.vocab_size, 32)
    result = evaluate_loss(model, shards, tokenizer.byte_lengths, tokens=150, tokens_per_batch=100)
    first = shards.lengths.cumsum()
    assert result["tokens"] == first[first >= 150][0]


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 10_000])
def test_the_loss_does_not_depend_on_how_much_is_read_at_a_time(
    tokenizer: Tokenizer, shards: TokenShards, tokens_per_batch: int
) -> None:
    model = small_model(tokenizer.vocab_size, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that what a token has seen matters
    options = {"tokens": 1000, "tokens_per_batch": 500}
    expected = evaluate_loss(model, shards, tokenizer.byte_lengths, **options)
    result = evaluate_loss(model, shards, tokenizer.byte_lengths, **{**options, "tokens_per_batch": tokens_per_batch})
    assert result == pytest.approx(expected, rel=1e-5)


def test_evaluation_leaves_the_model_in_training(tokenizer: Tokenizer, shards: TokenShards) -> None:
    model = small_model(tokenizer.vocab_size, 32).train()
    evaluate_loss(model, shards, tokenizer.byte_lengths, tokens=10, tokens_per_batch=64)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
