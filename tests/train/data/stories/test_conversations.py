"""Conversations about brief stories: what follows the first request, which facts it leaves asked, and its answer."""

import re
from itertools import islice, pairwise
from statistics import mean

import pytest

from engine.config import DataConfig
from train.data.sources import StoryRequests, open_conversations
from train.data.stories import (
    SPLITS,
    AskedFacts,
    StoryRequest,
    check_facts,
    is_held_out_pair,
    score_story,
    split_of,
    story_conversations,
    storybook,
)

HELD_OUT = ("validation", "test")


@pytest.fixture(scope="module")
def told() -> dict[str, list[list[StoryRequest]]]:
    return {split: list(islice(story_conversations(split), 240)) for split in SPLITS}


def hero(story: str) -> tuple[str, ...]:
    words = re.findall("[A-Za-z]+", story)
    return tuple(next(word for word in words if word in known) for known in storybook().heroes.values())


def test_conversations_have_one_to_four_turns_and_are_the_same_again(told: dict[str, list[list[StoryRequest]]]) -> None:
    assert list(islice(story_conversations("test", 7), 3)) == told["test"][7:10]
    turns = [len(some) for some in told["train"]]
    assert all(40 < turns.count(each) < 80 for each in (1, 2, 3, 4))
    assert {len(some) for some in islice(story_conversations("test", turns=4), 20)} == {4}


def test_held_out_answers_meet_all_that_their_conversation_asks_for(told: dict[str, list[list[StoryRequest]]]) -> None:
    for turn in range(4):
        scores = [score_story(some[turn].facts, some[turn].story) for some in told["test"] if len(some) > turn]
        assert all(all(score.met.values()) for score in scores) and mean(score.total for score in scores) > 0.99, turn


def test_what_changes_is_told_carelessly_where_it_is_trained_on(told: dict[str, list[list[StoryRequest]]]) -> None:
    met = [
        now.facts.name in hero(now.story)
        for before, now in (pair for some in told["train"] for pair in pairwise(some))
        if now.facts.name and now.facts.name != before.facts.name
    ]
    assert 0.7 < mean(met) < 0.9


def test_an_answer_that_ignores_what_is_asked_next_scores_less(told: dict[str, list[list[StoryRequest]]]) -> None:
    # Another request may by chance ask for no more than the one before; a change never does.
    pairs = [(a, b) for split in HELD_OUT for some in told[split] for a, b in pairwise(some) if b.facts.unlike]
    assert all(score_story(now.facts, before.story).total <= 0.85 for before, now in pairs)
    assert mean(score_story(now.facts, before.story).total for before, now in pairs) < 0.7


def test_another_ending_or_hero_is_one_that_was_not_asked_for(told: dict[str, list[list[StoryRequest]]]) -> None:
    asked = AskedFacts(kind="fox", unlike=AskedFacts(name="Ada", mood="sad"))
    assert check_facts("Ada the fox was sad.", asked) == {"kind": True, "other name": False, "other mood": False}
    assert check_facts("Zoe the fox was happy.", asked) == {"kind": True, "other name": True, "other mood": True}
    heroes = [pair for some in told["test"] for pair in pairwise(some) if pair[0].facts.kind and not pair[1].facts.kind]
    assert len(heroes) > 10
    for before, now in heroes:
        assert not set(hero(before.story)) & set(hero(now.story))


def test_a_change_leaves_the_rest_of_the_story(told: dict[str, list[list[StoryRequest]]]) -> None:
    changes = [(a, b) for some in told["test"] for a, b in pairwise(some) if b.facts.unlike is not None]
    endings = [(a.story, b.story) for a, b in changes if hero(a.story) == hero(b.story)]
    heroes = [(a.story, b.story) for a, b in changes if hero(a.story) != hero(b.story)]
    assert min(len(endings), len(heroes)) > 50
    for before, now in endings:
        assert before != now and before.split(". ")[0] == now.split(". ")[0]
    kept = [len({*before.split()} & {*now.split()}) / len({*before.split()}) for before, now in heroes]
    assert mean(kept) > 0.7


def test_no_turn_names_or_has_a_hero_of_another_split(told: dict[str, list[list[StoryRequest]]]) -> None:
    for split, conversations in told.items():
        for request in (request for some in conversations for request in some):
            name, kind, trait = hero(request.story)
            assert split_of(name, kind, trait) == split
            assert is_held_out_pair(kind, trait) == (split != "train")
            asked = request.facts
            if asked.kind and asked.trait:
                assert is_held_out_pair(asked.kind, asked.trait) == (split != "train"), request


def test_a_request_says_what_changes_and_is_clean(told: dict[str, list[list[StoryRequest]]]) -> None:
    texts = set()
    for before, now in (pair for split in SPLITS for some in told[split] for pair in pairwise(some)):
        for fact in ("name", "kind", "trait"):
            new = getattr(now.facts, fact)
            assert new is None or new == getattr(before.facts, fact) or new in now.text, now
        assert now.text[0].isupper() and now.text[-1] in ".?"
        assert not any(stray in now.text for stray in ("..", "?.", " .", ",,", "  ", "$", "|", "@")), now.text
        texts.add(now.text)
    assert len(texts) > 600


def test_the_source_holds_conversations_and_prompts_with_the_facts_of_their_turn() -> None:
    source = open_conversations(DataConfig(source="stories-instruct:chat", documents=400))
    assert isinstance(source, StoryRequests)
    for messages, (asked, facts), requests in zip(
        source.documents("validation"), source.prompts("validation"), source.requests("validation"), strict=True
    ):
        assert [message.content for message in messages] == [
            text for request in requests for text in (request.text, request.story)
        ]
        assert asked == messages[:-1] and asked[-1].role == "user" and facts == requests[-1].facts
    turns = [len(asked) // 2 for asked, _ in source.prompts("validation")]
    assert all(75 < turns.count(turn) < 125 for turn in range(4))
