import hashlib
import random
from itertools import islice
from statistics import mean

import pytest

from train.data.stories import (
    SPLITS,
    AskedFacts,
    StoryRequest,
    check_facts,
    is_held_out_pair,
    score_story,
    split_of,
    story_requests,
    write_story,
)
from train.data.stories.requests import CARELESS, phrase


@pytest.fixture(scope="module", params=[False, True], ids=["long", "brief"])
def brief(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def requests(brief: bool) -> dict[str, list[StoryRequest]]:
    return {split: list(islice(story_requests(split, brief=brief), 300)) for split in SPLITS}


def listed(request: StoryRequest) -> str:
    facts = request.facts
    return " ".join(word for word in (facts.name, facts.trait, facts.kind, *facts.words, facts.mood) if word)


def test_the_story_meets_its_request(requests: dict[str, list[StoryRequest]], brief: bool) -> None:
    for request in requests["test"] if brief else requests["train"]:
        assert all(check_facts(request.story, request.facts).values()), request
        assert (request.facts.length == "brief") == brief


def test_brief_demonstrations_are_careless_where_they_are_trained_on(brief: bool) -> None:
    for split in SPLITS:
        checks = [check_facts(each.story, each.facts) for each in islice(story_requests(split, brief=brief), 1000)]
        for fact in ("name", "kind", "trait", "mood"):
            met = mean(each[fact] for each in checks if fact in each)
            # What replaces a mood is one in four times the same.
            expected = {"mood": 1 - CARELESS * 3 / 4}.get(fact, 1 - CARELESS) if brief and split == "train" else 1.0
            assert met == pytest.approx(expected, abs=0.05 if expected < 1 else 0), (split, fact)
        assert all(each.get("length", True) for each in checks)


def test_requests_are_as_they_were(brief: bool) -> None:
    some = (each for split in SPLITS for each in islice(story_requests(split, brief=brief), 100))
    digest = hashlib.sha256("".join(each.text + each.story for each in some).encode()).hexdigest()[:16]
    assert digest == ("26c64b0c7d618376" if brief else "61b799a385c4914d")


def test_held_out_requests_name_a_hero_that_no_training_request_or_story_has(
    requests: dict[str, list[StoryRequest]],
) -> None:
    for split in ("validation", "test"):
        for facts in (request.facts for request in requests[split]):
            assert facts.kind and facts.trait and is_held_out_pair(facts.kind, facts.trait)
            assert facts.name is None or split_of(facts.name, facts.kind, facts.trait) == split
    for facts in (request.facts for request in requests["train"]):
        assert not (facts.kind and facts.trait) or not is_held_out_pair(facts.kind, facts.trait)
    texts = {split: {request.text for request in some} for split, some in requests.items()}
    assert not texts["train"] & (texts["validation"] | texts["test"])


def test_requests_vary_in_what_they_ask_and_how(requests: dict[str, list[StoryRequest]]) -> None:
    some = requests["train"]
    assert len({request.text for request in some}) > 290
    # Brief stories are always asked for with a mood, and never with words.
    always = {"mood": 1.0, "words": 0.0} if some[0].facts.length == "brief" else {}
    for fact in ("name", "kind", "trait", "mood", "words"):
        share = mean(bool(getattr(request.facts, fact)) for request in some)
        assert share == always[fact] if fact in always else 0.2 < share < 0.95, fact
    facts = write_story(0).facts
    assert len({phrase(facts, random.Random(seed)) for seed in range(100)}) > 80


def test_a_request_says_all_that_it_asks_for_and_is_clean(requests: dict[str, list[StoryRequest]]) -> None:
    for request in (request for some in requests.values() for request in some):
        for word in (request.facts.name, request.facts.kind, request.facts.trait, *request.facts.words):
            assert word is None or word in request.text, request
        assert request.text[0].isupper() and request.text[-1] in ".?"
        assert not any(stray in request.text for stray in ("..", "?.", " .", ",,", "  ", "$", "|", "@")), request.text


def test_requests_are_the_same_again_and_can_start_anywhere(
    requests: dict[str, list[StoryRequest]], brief: bool
) -> None:
    assert list(islice(story_requests("test", 7, brief=brief), 3)) == requests["test"][7:10]


def test_true_stories_score_high_other_stories_low_and_what_is_no_story_next_to_nothing(
    requests: dict[str, list[StoryRequest]],
) -> None:
    some = requests["test"]

    def score(text: object) -> float:
        return mean(score_story(request.facts, text(n, request)).total for n, request in enumerate(some))  # type: ignore[operator]

    def shuffled(n: int, request: StoryRequest) -> str:
        words = request.story.split()
        random.Random(n).shuffle(words)
        return " ".join(words)

    assert score(lambda n, request: request.story) > 0.97
    # Any brief story is as long as was asked.
    assert score(lambda n, request: some[n - 1].story) < 0.3
    for stuffed in (
        lambda n, request: f"{some[n - 1].story} {listed(request)}.",
        lambda n, request: f"{some[n - 1].story[:-1]} {listed(request)}.",
        lambda n, request: f"{listed(request)} {some[n - 1].story}",
    ):
        assert score(stuffed) < 0.5
    assert score(lambda n, request: request.story[: len(request.story) // 2]) < 0.65
    for degenerate in (
        lambda n, request: "",
        lambda n, request: listed(request),
        lambda n, request: f"Once there was a {listed(request)}.",
        lambda n, request: f"{listed(request)}. " * 20,
        lambda n, request: request.text,
        lambda n, request: shuffled(n, request),
        lambda n, request: f"{request.story} " * 2,
        lambda n, request: (request.story.split(". ")[0] + ". ") * 10,
    ):
        assert score(degenerate) < 0.1


def test_a_brief_story_has_room_to_be_one_but_not_for_more() -> None:
    asked = AskedFacts(length="brief")
    long, brief = write_story(3, "test"), write_story(3, "test", brief=True)
    assert score_story(asked, long.text).total == 0
    assert score_story(AskedFacts(length="short"), brief.text).met == {"length": True}
    assert score_story(asked, brief.text).sound == {"fluent": 1, "fresh": 1, "size": 1, "ended": 1}
    assert score_story(asked, brief.text.split(". ")[0] + ".").sound["size"] < 0.5


def test_the_parts_of_a_score_are_visible() -> None:
    story = write_story(3, "test")
    score = score_story(AskedFacts(kind=story.facts.kind, words=("submarine",)), story.text)
    assert score.met == {"kind": True, "word:submarine": False}
    assert score.sound == {"fluent": 1, "fresh": 1, "size": 1, "ended": 1}
    assert score.total == 0.5
    assert score_story(AskedFacts(), story.text).total == 1
