"""Encoding, cutting and packing: what is learnt of a conversation, and that none sees another."""

import random
from itertools import islice, pairwise

import pytest
import torch

from engine.chat_template import END, Message, answer_prompt, render
from engine.config import DataConfig
from engine.errors import InputError
from engine.model import GPT
from engine.tokenizer import Tokenizer
from train.data.encoded import Conversations
from train.data.formats import Conversation
from train.data.loader import IGNORE_INDEX, PackedLoader
from train.data.sources import open_conversations
from train.evaluation import evaluate_loss
from train.loop import packed_loss

CONTEXT = 48


def chat(*texts: str) -> Conversation:
    return [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


def some(count: int) -> list[Conversation]:
    draw = random.Random(0)
    words = ["the", "fox", "had", "a", "hat", "and", "boat", "on", "old", "owl's", "head"]
    return [chat(*(" ".join(draw.choices(words, k=draw.randint(1, 5))) for _ in range(2))) for _ in range(count)]


@pytest.fixture
def packed(tokenizer: Tokenizer) -> Conversations:
    return encode(tokenizer, *some(60))


def encode(tokenizer: Tokenizer, *conversations: Conversation) -> Conversations:
    encoded = Conversations(tokenizer, CONTEXT)
    for number, messages in enumerate(conversations):
        encoded.add(messages, f"conversation {number}")
    return encoded


def test_targets_are_the_assistants_next_tokens_alone(tokenizer: Tokenizer) -> None:
    messages = chat("a hat?", "the fox", "why?", "a boat <|end|>")
    encoded = encode(tokenizer, messages)
    inputs, targets = (part.tolist() for part in encoded.read(0, 0, int(encoded.lengths[0])))
    ids, learn = render(tokenizer, messages)
    assert inputs == ids[:-1]
    assert targets == [token if learnt else IGNORE_INDEX for token, learnt in zip(ids[1:], learn[1:], strict=True)]
    learnt = [target for target in targets if target != IGNORE_INDEX]
    assert tokenizer.decode(learnt) == "the foxa boat <|end|>"
    assert learnt.count(tokenizer.special[END]) == 2
    assert encoded.prompt(0) == answer_prompt(tokenizer, messages[:1])
    assert (encoded.learnt, encoded.tokens) == (len(learnt), len(inputs))


def test_an_overlong_conversation_is_cut_at_a_turn_and_a_hopeless_one_left_out(tokenizer: Tokenizer) -> None:
    long = "fox " * 60
    encoded = encode(
        tokenizer, chat("a", "b"), chat("a", "b", "c", long), chat("a", "b", long), chat(long, "b"), chat("a", long)
    )
    assert (len(encoded), encoded.cut, encoded.dropped) == (3, 1, 2)
    first = encoded.read(0, 0, int(encoded.lengths[0]))[0].tolist()
    for number in (1, 2):
        assert encoded.read(number, 0, int(encoded.lengths[number]))[0].tolist() == first
    assert "1 cut at a turn; 2 left out, longer than the context" in encoded.describe()


def test_the_longest_conversation_that_fits_is_kept_whole(tokenizer: Tokenizer) -> None:
    sizes = [len(render(tokenizer, chat("a", "x" * n))[0]) - 1 for n in range(80)]
    encoded = encode(tokenizer, *(chat("a", "x" * n) for n in range(1, 80)))
    assert encoded.lengths.tolist() == [size for size in sizes[1:] if size <= CONTEXT]
    assert encoded.lengths.max() == CONTEXT


def test_a_conversation_without_an_answer_is_refused_with_its_index(tokenizer: Tokenizer) -> None:
    for silent in (chat("hi"), chat("hi", " "), [Message("system", "hi")], []):
        with pytest.raises(InputError, match="conversation 1: the assistant says nothing"):
            encode(tokenizer, chat("hi", "hello"), silent)


def test_packed_loss_is_the_sum_of_separate_losses(gpt: GPT, packed: Conversations) -> None:
    loader = PackedLoader(packed, 4 * CONTEXT, CONTEXT, seed=0, whole=True, prefetch=0)
    with torch.no_grad():
        for batch in islice(loader, 5):
            bounds = batch.cu_seqlens.tolist()
            parts = [slice(*each) for each in pairwise(bounds)]
            separate = [
                gpt.loss(batch.tokens[part][None], batch.targets[part][None])
                for part in parts
                if (batch.targets[part] != IGNORE_INDEX).any()
            ]
            torch.testing.assert_close(packed_loss(gpt, batch), torch.stack(separate).sum())


def test_batches_hold_whole_conversations_once_an_epoch_and_are_of_one_size(packed: Conversations) -> None:
    loader = PackedLoader(packed, 4 * CONTEXT, CONTEXT, seed=0, whole=True, prefetch=0)
    known = {tuple(packed.read(n, 0, int(length))[0].tolist()): n for n, length in enumerate(packed.lengths)}
    assert len(known) == len(packed)
    seen: list[int] = []
    while loader.epoch < 3:
        batch = next(loader)
        assert len(batch.tokens) == 4 * CONTEXT
        bounds = batch.cu_seqlens.tolist()
        sequences = [slice(*each) for each in pairwise(bounds)]
        if (batch.targets[sequences[-1]] == IGNORE_INDEX).all():
            assert len(batch.tokens[sequences.pop()]) < CONTEXT
        seen += [known[tuple(batch.tokens[part].tolist())] for part in sequences]
    assert loader.tokens == sum(int(packed.lengths[number]) for number in seen)
    for epoch in range(3):
        assert sorted(seen[epoch * len(packed) : (epoch + 1) * len(packed)]) == list(range(len(packed)))
    assert loader.batches_per_epoch() == pytest.approx(loader.state_dict()["batches"] / loader.epoch, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("parts", [2, 5, 32])
def test_a_batch_in_parts_learns_every_answer_with_its_question(gpt: GPT, packed: Conversations, parts: int) -> None:
    batch = next(PackedLoader(packed, 6 * CONTEXT, CONTEXT, seed=0, whole=True, prefetch=0))
    losses = [packed_loss(gpt, part) for part in batch.split(parts)]
    assert 1 < len(losses) <= parts
    torch.testing.assert_close(torch.stack(losses).sum(), packed_loss(gpt, batch))


def test_a_loader_of_whole_conversations_resumes_to_the_bit(packed: Conversations) -> None:
    def loader() -> PackedLoader:
        return PackedLoader(packed, 4 * CONTEXT, CONTEXT, seed=0, whole=True, prefetch=0)

    first = loader()
    list(islice(first, 11))
    second = loader()
    second.load_state_dict(first.state_dict())
    for one, other in islice(zip(first, second, strict=True), 20):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.targets, other.targets)
    shorter = PackedLoader(encode(packed.tokenizer, *some(59)), 4 * CONTEXT, CONTEXT, seed=0, whole=True, prefetch=0)
    with pytest.raises(InputError, match="cannot be resumed with another data"):
        shorter.load_state_dict(first.state_dict())


def test_evaluation_counts_what_is_learnt_alone(gpt: GPT, packed: Conversations, tokenizer: Tokenizer) -> None:
    found = evaluate_loss(gpt, packed, tokenizer.byte_lengths, tokens=packed.tokens, tokens_per_batch=100)
    assert found["tokens"] == packed.learnt


def test_brief_stories_answer_the_brief_requests() -> None:
    source = open_conversations(DataConfig(source="stories-instruct:brief", documents=30))
    assert source is not None
    assert all(len(answer.content.split()) <= 45 for _, answer in source.documents("train"))


def test_the_built_in_conversations_are_read_up_to_a_number_of_tokens(tokenizer: Tokenizer) -> None:
    source = open_conversations(DataConfig(source="stories-instruct", documents=30))
    assert source is not None
    encoded = Conversations(tokenizer, 1000, source).read_split("train", max_tokens=4000)
    assert 4000 <= encoded.tokens < 5000
    assert len(Conversations(tokenizer, 1000, source).read_split("validation")) == 30
    with pytest.raises(InputError, match=r"no conversation of stories-instruct .* 30 left out, longer .* shorter"):
        Conversations(tokenizer, CONTEXT, source).read_split("train")
