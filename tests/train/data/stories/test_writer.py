import hashlib
import re
import subprocess
import sys
from itertools import islice

import pytest

from train.data.stories import SPLITS, Story, check_facts, split_of, stories, storybook, write_story
from train.data.stories.grammar import Cast, parse, tell
from train.data.stories.writer import STORYBOOK


@pytest.fixture(scope="module")
def many() -> list[Story]:
    return list(stories("train", 0, 20_000))


@pytest.fixture(scope="module")
def brief() -> list[Story]:
    return list(stories("train", 0, 20_000, brief=True))


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[Story]]:
    return {split: list(stories(split, 0, 2_000)) for split in ("validation", "test")}


def test_every_story_meets_all_of_its_facts(
    many: list[Story], brief: list[Story], held_out: dict[str, list[Story]]
) -> None:
    for story in [*many[:5_000], *brief, *held_out["validation"], *held_out["test"]]:
        checks = check_facts(story.text, story.facts)
        assert all(checks.values()), (checks, story)
        assert 1 <= len(story.facts.words) <= 3, story


def test_another_storys_facts_are_not_met(many: list[Story]) -> None:
    met = [check_facts(one.text, other.facts) for one, other in zip(many[:1000], many[1000:2000], strict=True)]
    assert not any(all(checks.values()) for checks in met)
    for fact, share in {"name": 0.1, "kind": 0.6, "trait": 0.2, "mood": 0.4}.items():
        assert sum(checks[fact] for checks in met) / len(met) < share, fact


def test_no_two_stories_are_alike(many: list[Story], brief: list[Story], held_out: dict[str, list[Story]]) -> None:
    texts = [story.text for some in (many, brief, *held_out.values()) for story in some]
    assert len(set(texts)) == len(texts)


def test_brief_stories_are_three_sentences_of_20_to_45_words(brief: list[Story]) -> None:
    for story in brief:
        assert story.facts.length == "brief" and len(story.text.split()) >= 20, story
        assert len(re.findall(r'[.!?](?=$| [A-Z"])', story.text)) == 3, story
    assert len({story.plot for story in brief}) == 11
    assert {story.facts.mood for story in brief} == set(storybook().moods.values())


def test_long_stories_are_as_they_were() -> None:
    texts = "".join(story.text for split in SPLITS for story in stories(split, 0, 100))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "d51a43134fde2e78"


def test_the_split_can_be_read_from_the_text_alone(
    many: list[Story], brief: list[Story], held_out: dict[str, list[Story]]
) -> None:
    for split, some in {"train": many + brief, **held_out}.items():
        for story in some:
            words = re.findall("[A-Za-z]+", story.text)
            first = [next(word for word in words if word in known) for known in storybook().heroes.values()]
            assert first == [story.facts.name, story.facts.kind, story.facts.trait], story
            assert split_of(*first) == split


def test_the_words_are_many_and_held_out_stories_use_no_others(
    many: list[Story], held_out: dict[str, list[Story]]
) -> None:
    def vocabulary(some: list[Story]) -> set[str]:
        return {word for story in some for word in re.findall("[a-z']+", story.text.lower())}

    assert len(vocabulary(many)) >= 2_000
    assert len(vocabulary(held_out["validation"]) - vocabulary(many)) <= 5


def test_plots_moods_lengths_and_kinds_all_occur(many: list[Story]) -> None:
    facts = [story.facts for story in many]
    assert len({story.plot for story in many}) >= 12
    assert {fact.mood for fact in facts} == set(storybook().moods.values())
    assert {fact.length for fact in facts} == {"short", "medium", "long"}
    assert {"girl", "boy", "rabbit", "dragon", "robot"} <= {fact.kind for fact in facts}
    assert 700 <= sum(len(story.text) for story in many) / len(many) <= 800


def test_the_text_is_clean(many: list[Story], brief: list[Story]) -> None:
    stray = re.compile(r"[{}|@$<>+_]|  | [.,!?]|[.,!?]{2}|,\"? [A-Z]\w+ [A-Z]\w+ said|\b[Aa] [aeio]|\b[Aa]n [^aeiouh]")
    for story in many[:5_000] + brief[:5_000]:
        found = stray.search(story.text)
        assert not found, story.text[max(0, found.start() - 30) :]
        assert story.text.count('"') % 2 == 0, story.text
        assert not re.search(r'(^|[.!?] |\n)"?[a-z]', re.sub(r'[!?]" [a-z]', "", story.text)), story.text


def test_no_sentence_is_told_twice(many: list[Story]) -> None:
    for story in many[:5_000]:
        sentences = [s for s in re.split(r'(?<=[.!?"]) (?=[A-Z"])|\n+', story.text) if len(s.split()) > 3]
        assert len(sentences) == len(set(sentences)), story.text


def test_authors_leave_pronouns_to_the_cast() -> None:
    for path in [STORYBOOK / "phrases.txt", *STORYBOOK.glob("*/*.txt")]:
        assert not re.search(r"(?i)(?<!\$)\b(s?he|him|her|his|hers|(him|her)self)\b", path.read_text()), path


def test_a_story_is_the_same_in_another_process() -> None:
    def digest() -> str:
        return hashlib.sha256(repr([write_story(i, split) for split in SPLITS for i in range(50)]).encode()).hexdigest()

    code = (
        "import hashlib; from train.data.stories import *\n"
        "found = [write_story(i, split) for split in SPLITS for i in range(50)]\n"
        "print(hashlib.sha256(repr(found).encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()


def test_stories_can_start_anywhere() -> None:
    assert list(islice(stories("test", 7), 3)) == [write_story(i, "test") for i in (7, 8, 9)]
    with pytest.raises(ValueError):
        write_story(0, "exam")


def test_the_grammar_does_what_it_says() -> None:
    cast = Cast(name="Tim", thing="peach", he="he", temper="bold")

    def told(text: str, keep: float = 1.0) -> str:
        return tell(parse(text, {"hello": "Good day|Good day"}), cast, frozenset({"bold"}), lambda: 0.0, keep)

    assert told("{a|b} {c {d|e}|f}") == "a c d"
    assert told("{@shy a|@bold b|c}, {@shy a|c}, {@shy a}.") == "b, c,."
    assert told("<hello>, $name. $He ate $things, a apple , and a $thing .") == (
        "Good day, Tim. He ate peaches, an apple, and a peach."
    )
    assert (told("one{+ , two}.\n+ three"), told("one{+ , two}.\n+ three", keep=0.0)) == ("one, two. three", "one.")
    assert told("one\n\ntwo") == "one\n\ntwo"
    for broken in ("{a|b", "a}", "a|b"):
        with pytest.raises(ValueError):
            told(broken)
