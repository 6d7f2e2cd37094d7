"""Preferences: read in every format, counted where they are left out, packed such that pairs stay whole."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from engine.chat_template import END, Message, render
from engine.config import DataConfig
from engine.errors import InputError
from engine.tokenizer import Tokenizer
from rlhf.preferences import (
    PairLoader,
    Pairs,
    Preference,
    open_preferences,
    prefer,
    read_preferences,
    write_answer,
)
from tests.train.data.hub import Hub
from train.data.loader import IGNORE_INDEX
from train.data.rows import Skipped
from train.data.stories import SPLITS, is_held_out_pair, score_story, story_requests

ASKED = (Message("user", "2 + 2?"),)
SUM = Preference(ASKED, "4", "5")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [user("2 + 2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"prompt": "2 + 2?", "chosen": [user("2 + 2?"), assistant("4")], "rejected": [user("2 + 2?"), assistant("5")]},
        {"chosen": [user("2 + 2?"), assistant("4")], "rejected": [user("2 + 2?"), assistant("5")]},
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {
            "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
            "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5",
        },
    ],
)
def test_every_format_says_the_same(row: dict[str, Any]) -> None:
    assert list(read_preferences([("row 1", row)])) == [SUM]


def test_hh_rlhf_prompts_reach_to_the_last_assistant() -> None:
    begin = "\n\nHuman: Hi\n\nAssistant: Hello, Human: you\n\nHuman: Well?\n\nAssistant:"
    (found,) = read_preferences([("row 1", {"chosen": f"{begin} Good.", "rejected": f"{begin} "})])
    assert found == Preference(
        (Message("user", "Hi"), Message("assistant", "Hello, Human: you"), Message("user", "Well?")), "Good.", ""
    )


def test_what_is_no_preference_is_left_out_or_named() -> None:
    parted = {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]}
    unasked = {"chosen": "a", "rejected": "b"}
    unanswered = {"chosen": [user("a"), user("b")], "rejected": [user("a"), assistant("c")]}
    found = list(read_preferences(("row", row) for row in (parted, unasked, unanswered)))
    assert found == [Skipped("row", "not two answers to one prompt")] * 3
    (lost,) = read_preferences([("row", {"prompt": "a", "chosen": "b", "rejected": None})])
    assert lost == Skipped("row", "without an answer")
    with pytest.raises(InputError, match=r"row 3: a preference has columns chosen and rejected; there are text"):
        list(read_preferences([("row 3", {"text": "a"})]))


def test_hub_sets_by_their_short_names(hub: Hub) -> None:
    row = {"prompt": "2 + 2?", "chosen": [user("2 + 2?"), assistant("4")], "rejected": [user("2 + 2?"), assistant("5")]}
    row["messages"] = row["chosen"]
    other = row | {"prompt": "a", "messages": [user("a"), assistant("b")]}
    hub.rows("HuggingFaceH4/ultrafeedback_binarized", train_sft=[other], train_prefs=[row] * 60, test_prefs=[row] * 2)
    source = open_preferences(DataConfig(source="ultrafeedback_binarized"))
    assert list(source.documents("test")) == [SUM] * 2
    assert next(source.documents("train")) == SUM
    text = "\n\nHuman: 2 + 2?\n\nAssistant: "
    hub.rows("Anthropic/hh-rlhf", train=[{"chosen": text + "4", "rejected": text + "5"}] * 60)
    held_out = open_preferences(DataConfig(source="hh-rlhf"))
    assert next(held_out.documents("validation")) == SUM
    assert held_out.held_out_by == "one in 50 of the documents by their number: all have one prompt"


def test_what_shares_a_prompt_stands_on_one_side(tmp_path: Path) -> None:
    """Several pairs of one prompt, as `gpt rlhf pairs` writes them; and the same in whole conversations."""
    rows = [{"prompt": f"{p} + 2?", "chosen": f"{a}", "rejected": f"{-a}"} for p in range(100) for a in range(1, 7)]
    more = [
        {side: [user(f"{p} + 2?"), assistant("Why?"), user("So."), assistant(side)] for side in ("chosen", "rejected")}
        for p in range(100)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    source = open_preferences(DataConfig(source=str(tmp_path / "a.jsonl"), holdout=0.1))
    train, held_out = ({each.prompt[0].content for each in source.documents(split)} for split in SPLITS[:2])
    assert not train & held_out and (len(train), len(held_out)) == (90, 10)
    assert sum(1 for split in SPLITS[:2] for _ in source.documents(split)) == 700
    assert source.held_out_by == "one in 10 of the prompts, with all answers to them"


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"}, ASKED),
        (
            {"system": "Be brief.", "prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
            (Message("system", "Be brief."), *ASKED),
        ),
        ({"instruction": "2 + 2?", "chosen": "4", "rejected": "5"}, ASKED),
        ({"prompt": "[2, 2]", "chosen": "4", "rejected": "5"}, (Message("user", "[2, 2]"),)),
        ({"instruction": "2 +", "input": "2?", "chosen": "4", "rejected": "5"}, (Message("user", "2 +\n\n2?"),)),
        (
            {
                "prompt": [user("Hi")],
                "chosen": [assistant("Hello"), user("2 + 2?"), assistant("4")],
                "rejected": [assistant("Hello"), user("2 + 2?"), assistant("5")],
            },
            (Message("user", "Hi"), Message("assistant", "Hello"), *ASKED),
        ),
        (
            {
                "system": "Be brief.",
                "prompt": "2 + 2? ",
                "chosen": [user("2 + 2?"), assistant("4")],
                "rejected": [user("2 + 2?"), assistant("5")],
            },
            (Message("system", "Be brief."), *ASKED),
        ),
    ],
)
def test_nothing_of_the_prompt_is_dropped_or_put_in(row: dict[str, Any], asked: tuple[Message, ...]) -> None:
    assert list(read_preferences([("row 1", row)])) == [Preference(asked, "4", "5")]


def test_columns_of_preferences_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"ask": "2 + 2?", "good": "4", "bad": "5"}) + "\n")
    named = DataConfig(source=str(path), prompt_column="ask", chosen_column="good", rejected_column="bad")
    assert list(open_preferences(named).documents("train")) == [SUM]
    with pytest.raises(
        InputError, match="columns chosen and rejected; there are ask, good, bad: name them with --chosen"
    ):
        list(open_preferences(DataConfig(source=str(path))).documents("train"))


def test_before_training_a_person_sees_what_was_understood(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n // 2} + 2?", "chosen": "4", "rejected": "5"} for n in range(8)]
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "chosen": None}])
    )
    (tmp_path / "val.jsonl").write_text(json.dumps(rows[0]) + "\n")
    source = open_preferences(DataConfig(source=str(tmp_path)))
    train, held_out = (Pairs(tokenizer, 48, source).read_split(split) for split in SPLITS[:2])
    assert train.describe_beside(held_out) == (
        f"train      8 pairs of 9 rows: 4 prompts, 0 system texts; {train.tokens} tokens; "
        f"1 left out, without an answer (first: {tmp_path}/train.jsonl, line 9)",
        f"validation 1 pairs of 1 rows: 1 prompts, 0 system texts; {held_out.tokens} tokens",
        "held out   the data's own validation split, by the name of the file: val.jsonl; "
        "1 of its 1 prompts are trained on as well",
    )


def test_pairs_end_with_the_end_piece_and_know_their_prompt(tokenizer: Tokenizer) -> None:
    pairs = Pairs(tokenizer, 48)
    pairs.add(SUM)
    chosen, rejected = pairs.pair(0)
    assert chosen == render(tokenizer, [*ASKED, Message("assistant", "4")])[0]
    assert chosen[-1] == rejected[-1] == tokenizer.special[END]
    assert pairs.prompt(0) == [*render(tokenizer, ASKED)[0], tokenizer.special["<|assistant|>"]]
    assert pairs.lengths.tolist() == [len(chosen) + len(rejected)] and pairs.tokens == sum(pairs.lengths)


def test_pairs_left_out_or_cut_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = "the little fox " * 20
    rows = [
        {"prompt": "hat?", "chosen": "a", "rejected": "b"},
        {"prompt": "hat?", "chosen": "a", "rejected": "a"},
        {"prompt": "hat?", "chosen": "a", "rejected": long},
        {"prompt": [user(long), assistant("bear"), user("hat?")], "chosen": "a", "rejected": "b"},
        {"chosen": "a", "rejected": "b"},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "val.jsonl").write_text(json.dumps(rows[1]))
    source = open_preferences(DataConfig(source=str(tmp_path)))
    pairs = Pairs(tokenizer, 48, source).read_split("train")
    assert (len(pairs), pairs.same, pairs.dropped, pairs.cut) == (2, 1, 1, 1)
    assert pairs.source and pairs.source.skipped == {"not two answers to one prompt": (1, f"{path}, line 5")}
    assert pairs.pair(0) == pairs.pair(1)
    said = pairs.describe()
    assert "1 left out, without a difference" in said and "1 left out, longer than the context" in said
    with pytest.raises(InputError, match=r"no pair of .* is left"):
        Pairs(tokenizer, 48, source).read_split("validation")


def test_batches_hold_whole_pairs_however_they_are_split(tokenizer: Tokenizer) -> None:
    pairs = Pairs(tokenizer, 48)
    for n in range(30):
        pairs.add(Preference(ASKED, "fox " * (n % 5), f"bear {n}"))
    known = {tuple(map(tuple, pairs.pair(n))) for n in range(len(pairs))}
    loader = PairLoader(pairs, 4 * 48, 2 * 48, seed=0, whole=True, prefetch=0)
    for _ in range(6):
        batch = next(loader)
        count = int((batch.targets != IGNORE_INDEX).sum())
        for parts in (1, 3):
            found = []
            for part in batch.split(parts):
                bounds = part.cu_seqlens.tolist()
                texts = [tuple(part.tokens[a:b].tolist()) for a, b in pairwise(bounds)]
                found += [*zip(texts[::2], texts[1::2], strict=False)]
            assert len(found) == count > 1 and known.issuperset(found)


def test_the_judge_is_a_coin_of_the_difference_that_sometimes_errs() -> None:
    rng = Random(0)
    said = [prefer(ASKED, ("good", "bad"), (1.0, 0.5), rng) for _ in range(4000)]
    right = sum(each.chosen == "good" for each in said) / len(said)
    # sigma(1) of the time, but for one in twenty the other way round.
    assert right == pytest.approx(0.731 * 0.95 + 0.269 * 0.05, abs=0.02)
    assert all(each.gold == (each.chosen == "good") for each in said)
    assert prefer(ASKED, ("good", "fine"), (1.0, 1.0), rng).gold is None


def test_built_in_preferences_are_the_same_again_and_held_out_ones_are_of_held_out_heroes() -> None:
    found = {
        split: list(open_preferences(DataConfig(source="stories-preferences", documents=60)).documents(split))
        for split in SPLITS
    }
    again = open_preferences(DataConfig(source="stories-preferences", documents=60)).documents("validation", 20)
    assert list(again) == found["validation"][20:]
    assert all(len(each) == 60 for each in found.values())
    asked = {each.prompt[0].content: each for each in found["validation"]}
    for _, request in zip(range(61), story_requests("validation"), strict=False):
        assert is_held_out_pair(str(request.facts.kind), str(request.facts.trait))
        if preference := asked.get(request.text):
            scores = [score_story(request.facts, text).total for text in (preference.chosen, preference.rejected)]
            assert preference.gold == (None if scores[0] == scores[1] else scores[0] > scores[1])


def test_answers_are_of_every_quality() -> None:
    stories = [request for _, request in zip(range(101), story_requests("train"), strict=False)]
    scores = torch.tensor(
        [
            score_story(request.facts, write_answer(request, other, Random(n))).total
            for n, (other, request) in enumerate(pairwise(stories))
        ]
    )
    assert (torch.histc(scores, 5, 0, 1) > 5).all()
