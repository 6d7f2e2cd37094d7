"""A new model begins with what the text says of its weights: which token follows which."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import ModelConfig, Recipe, override
from engine.errors import InputError
from engine.initial import weights_of_text
from engine.model import GPT
from tests.train.conftest import Train
from tests.train.test_loop import losses
from train.data.shards import TokenShards
from train.pretrain import count_pairs

SHAPE = ModelConfig(200, 128, 2, 4, 64, norm="rms", mlp="gated", qk_norm=True, start="bigrams")
OTHERS: dict[str, dict[str, Any]] = {
    "layer norm": {"norm": "layer", "mlp": "gelu", "qk_norm": False},
    "shared keys": {"key_heads": 2},
    "one head": {"heads": 1, "head_width": 32},
    "wider than the vocabulary": {"width": 256},
}
NARROW = [dataclasses.replace(SHAPE, width=width, heads=1) for width in (2, 4)]


def chain(tokens: int, behind: int) -> torch.Tensor:
    """Return tokens of which each says, with three chances in four, which one comes `behind` after it."""
    drawn = np.random.default_rng(0)
    following, text = drawn.permutation(SHAPE.vocab_size), drawn.integers(0, SHAPE.vocab_size, tokens)
    for place in np.flatnonzero(drawn.random(tokens) < 0.75).tolist():
        if place >= behind:
            text[place] = following[text[place - behind]]
    return torch.from_numpy(text)


def pairs_of(text: torch.Tensor, vocab: int) -> list[torch.Tensor]:
    tables = []
    for distance in range(1, 5):
        table = torch.zeros(vocab, vocab)
        table.index_put_((text[:-distance], text[distance:]), torch.ones(()), accumulate=True)
        tables.append(table.to_sparse())
    return tables


def loss_of(config: ModelConfig, text: torch.Tensor, pairs: list[torch.Tensor] | None) -> float:
    """Return the mean loss over held-out tokens, as a model begins."""
    torch.manual_seed(0)
    model = GPT(config)
    if pairs:
        weights = weights_of_text(model, pairs, torch.Generator().manual_seed(0))
        assert all(weight.isfinite().all() for weight in weights.values())
        model.load_state_dict(weights, strict=False)
    rows = text.unfold(0, 49, 48)
    with torch.no_grad():
        return float(model.loss(rows[:, :-1], rows[:, 1:])) / (48 * len(rows))


@pytest.mark.parametrize("name", ["qwen3", *OTHERS])
def test_it_begins_as_a_model_of_which_token_follows_which(name: str) -> None:
    config, text = dataclasses.replace(SHAPE, **OTHERS.get(name, {})), chain(60_000, behind=1)
    text, held_out = text[:-4900], text[-4900:]
    assert loss_of(config, held_out, None) == pytest.approx(math.log(200), rel=0.01)
    # 0.75 + 0.25 / 200 for the one that follows, 0.25 / 200 for each other: 1.88 nats.
    assert 1.8 < loss_of(config, held_out, pairs_of(text, 200)) < 2.9


@pytest.mark.parametrize("behind", [2, 3, 4])
def test_heads_that_look_back_add_what_tokens_before_say(behind: int) -> None:
    text = chain(60_000, behind)
    text, held_out = text[:-4900], text[-4900:]
    pairs = pairs_of(text, 200)
    neighbours = loss_of(SHAPE, held_out, [pairs[0], *(torch.zeros(200, 200).to_sparse() for _ in range(3))])
    assert loss_of(SHAPE, held_out, pairs) < neighbours - 0.3


def test_threads_do_not_matter() -> None:
    pairs = pairs_of(chain(20_000, 1), SHAPE.vocab_size)
    torch.manual_seed(0)
    model, found = GPT(SHAPE), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(weights_of_text(model, pairs, torch.Generator().manual_seed(0)))
    torch.set_num_threads(before)
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-5, atol=1e-6)


def test_a_text_that_says_nothing_leaves_weights_finite() -> None:
    for text in (torch.zeros(3, dtype=torch.int64), torch.arange(2)):
        for config in (SHAPE, *NARROW):
            loss_of(config, chain(200, 1), pairs_of(text, 200))


def test_pairs_are_counted_within_documents_from_all_of_the_text(prepared: Path) -> None:
    train = TokenShards(prepared, "train")
    expected: Counter[tuple[int, ...]] = Counter()
    for number in range(len(train.lengths)):
        ids = train.document(number)
        expected.update(zip(ids[:-3].tolist(), ids[3:].tolist(), strict=True))
    found = count_pairs(train, math.inf, 3)[2].to_dense()
    assert {tuple(place): int(found[*place]) for place in found.nonzero().tolist()} == expected
    part = count_pairs(train, train.tokens / 4, 1)[0].to_dense()
    assert 0.1 < float(part.sum()) / train.tokens < 0.4
    assert count_pairs(train, 7, 1)[0].sum() == 7  # of a document that is longer
    last = train.document(len(train.lengths) - 1)
    assert part[last[0], last[1]] > 0


def test_a_run_begins_with_them(small: Recipe, train: Train, tmp_path: Path) -> None:
    said = {start: train(override(small, "model.start", start), start)[1].said for start in ("local", "bigrams")}
    assert (
        f"start      by which token follows which in {6 * small.tokens_per_step:,} tokens of the text"
        in said["bigrams"]
    )
    assert not any(line.startswith("start") for line in said["local"])
    first = {start: losses(tmp_path / start)[0] for start in ("local", "bigrams")}
    assert first["bigrams"] < first["local"] - 0.5


def test_a_head_that_is_the_embedding_cannot_begin_so() -> None:
    with pytest.raises(InputError, match=r"model\.start is bigrams; it must be gpt2 or local where the head is"):
        dataclasses.replace(SHAPE, tied=True)
