"""Pairs of a model's own answers: what is kept, what is left out and counted, and that they are read again."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.chat_template import END, Message, answer_ends
from engine.errors import InputError
from engine.model import GPT
from engine.tokenizer import Tokenizer
from rlhf.preferences import Pairs, Preference, read_preferences
from rlhf.prompts import Prompt, Prompts
from rlhf.reward_model import ProgramReward
from rlhf.rollout import Rollout
from rlhf.sampled_pairs import sample_pairs
from train.data.stories import StoryScore

ASKED = [Message("system", "Be brief."), Message("user", "say fox")]


class Length(ProgramReward):
    """Worth as much as it is long."""

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([float(len(answer)) for answer in answers])

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[StoryScore]:
        return [StoryScore({str(place): True for place in range(len(answer))}, {}) for answer in answers]


@pytest.fixture
def prompts(tokenizer: Tokenizer) -> Prompts:
    found = Prompts(tokenizer, 48)
    for messages in (ASKED, ASKED[1:]):
        found.add([*messages, Message("assistant", "fox")])
    return found


def test_what_cannot_be_told_apart_is_left_out_and_counted(
    gpt: GPT, prompts: Prompts, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, words = tokenizer.special[END], [[*tokenizer.encode(word)] for word in ("fox", "fox the fox the fox", "bear")]
    answers = [[*words[0], end], [*words[0], end], [*words[1], end], [*words[2], 7, 7], *([[*words[0], end]] * 3), [7]]
    tie = [*tokenizer.encode("hat")][: len(words[0])]
    answers[5] = [*tie, *words[0][len(tie) :], end]

    def drawn(model: GPT, asked: list[Prompt], *rest: Any, **options: Any) -> Rollout:
        assert asked == prompts.first(2) and options["each"] == 4
        asked = [prompt for prompt in asked for _ in range(4)]
        return Rollout(asked, answers, torch.tensor([answer[-1] == end for answer in answers]), torch.zeros(1))

    monkeypatch.setattr("rlhf.sampled_pairs.roll_out", drawn)
    found = sample_pairs(gpt, prompts, Length(tokenizer), answers=4)
    # Of the first prompt: equal texts, and two pairs with the longer one. Of the second: equal texts, two ties.
    assert (len(found.pairs), found.same, found.ties, found.unfinished) == (2, 2, 2, 2)
    long = tokenizer.decode(words[1])
    assert all(pair.gold == (pair.chosen == long) and pair.prompt == tuple(ASKED) for pair in found.pairs)
    assert "2 ties, 2 of equal texts, 2 answers that did not end" in found.describe()


def test_the_same_seed_gives_the_same_pairs_and_only_the_program_knows_gold(
    gpt: GPT, prompts: Prompts, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.sampled_pairs.answer_ends", lambda _: answer_ends(tokenizer) | set(range(100, 200)))
    first, again, other = (sample_pairs(gpt, prompts, Length(tokenizer), answers=6, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and len(first.pairs) > 3
    unknown = sample_pairs(gpt, prompts, lambda *given: Length(tokenizer)(*given), answers=6, seed=1)
    assert {pair.gold for pair in unknown.pairs} == {None}
    assert [pair.chosen for pair in unknown.pairs] == [pair.chosen for pair in first.pairs]


def test_lines_are_read_as_what_they_were(tokenizer: Tokenizer) -> None:
    pairs = [Preference(tuple(ASKED), "a", "b", True), Preference((ASKED[1],), "a", 'b "c"', None)]
    rows = [(f"row {number}", json.loads(pair.to_json_line())) for number, pair in enumerate(pairs)]
    assert list(read_preferences(rows)) == pairs
    held = Pairs(tokenizer, 48)
    for pair in pairs:
        held.add(pair)
    assert held.gold == [True, None]
    with pytest.raises(InputError, match="gold is 'yes'; it must be true, false or null"):
        list(read_preferences([("row 0", {**rows[0][1], "gold": "yes"})]))
