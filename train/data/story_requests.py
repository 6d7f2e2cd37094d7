"""The built-in instructions: requests for stories, each with the story that answers it and the facts it asks for.

Everything follows from (seed, split), as the stories do. One (kind, trait) pair in ten is held out: no training request
or answer is about such a hero, while every held-out request names one, and its story is of a held-out split itself. So
what the held-out requests ask for was asked for in no training request, and no model has read their stories. Brief
stories answer training requests carelessly, held-out ones to the letter.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice
from random import Random

from train.data.stories import MOOD_CUES, AskedFacts, StoryFacts, cast_story, read_blocks, storybook, write_story
from train.data.story_grammar import Cast, Parts, join_lines, parse, tell

# How likely a request says each of these.
ASKED = {"name": 0.6, "kind": 0.85, "trait": 0.75, "words": 0.65, "mood": 0.6, "length": 0.35}
# Brief stories are for what is learnt in minutes: to use any word that is asked for is not, to keep to a mood is.
ASKED_BRIEF = ASKED | {"words": 0.0, "mood": 1.0, "length": 1.0}
# How often the brief story that answers a training request leaves one of its facts to chance. Demonstrations are seldom
# perfect: what a model can do better than they do is what alignment is for. Held-out requests have their very stories.
CARELESS = 0.2


@dataclass(frozen=True)
class StoryRequest:
    text: str
    facts: AskedFacts
    story: str


def story_requests(split: str, start: int = 0, *, brief: bool = False) -> Iterator[StoryRequest]:
    """The requests of a split from number `start` on, without end: for stories, or for brief ones."""
    return islice((_request(seed, split, brief) for seed in count() if _belongs(seed, split)), start, None)


def is_held_out_pair(kind: str, trait: str) -> bool:
    """Whether no training request or answer is about such a hero."""
    rank = storybook().rank
    return (3 * rank[kind] + rank[trait]) % 10 == 0


def _belongs(seed: int, split: str) -> bool:
    cast = cast_story(seed, split)[1].cast
    return is_held_out_pair(cast["kind"], cast["trait"]) == (split != "train")


def _request(seed: int, split: str, brief: bool) -> StoryRequest:
    story, rng = write_story(seed, split, brief=brief), Random(f"{split} {seed}")
    asked = {fact for fact, likely in (ASKED_BRIEF if brief else ASKED).items() if rng.random() < likely}
    if split != "train":
        asked |= {"kind", "trait"}
    facts = AskedFacts(**{fact: getattr(story.facts, fact) for fact in sorted(asked)})
    if brief and split == "train":
        facts = _misheard(facts, rng)
    return StoryRequest(phrase(facts, rng), facts, story.text)


def _misheard(facts: AskedFacts, rng: Random) -> AskedFacts:
    """What somebody careless answered with a story of these facts: now and then each of them was any, not this one."""
    book = storybook()
    choices = {
        "name": sorted({name for some in book.names.values() for name in some}),
        "kind": sorted({kind for rows in book.kinds.values() for row in rows for kind in row["kind"]}),
        "trait": [trait for trait, _ in book.tempers],
        "mood": sorted(MOOD_CUES),
    }
    while True:
        others = {
            fact: rng.choice(some)
            for fact, some in choices.items()
            if getattr(facts, fact) is not None and rng.random() < CARELESS
        }
        asked = replace(facts, **others)  # type: ignore[arg-type]
        if not (asked.kind and asked.trait and is_held_out_pair(asked.kind, asked.trait)):
            return asked


def phrase(facts: AskedFacts | StoryFacts, rng: Random) -> str:
    """A request for a story with these facts, in words drawn at random."""
    said = {"k": facts.kind, "t": facts.trait, "n": facts.name}
    hero = "".join(letter for letter, value in said.items() if value)
    *others, last = facts.words or ("",)
    cast = Cast(
        kind=facts.kind or "",
        trait=facts.trait or "",
        name=facts.name or "",
        words=f"{', '.join(others)} and {last}" if others else last,
    )
    tags = [hero, "hero" if hero else "", facts.mood, facts.length, ("", "word", "words")[min(len(facts.words), 2)]]
    text = tell(_grammar(), cast, frozenset(tag for tag in tags if tag), rng.random, 1.0)
    # A sentence that nothing asks for leaves its full stop behind.
    return re.sub(r"^\W+|(?<=[.?])[. ]*\.", "", text)


@cache
def _grammar() -> Parts:
    return parse("<request>", {name: join_lines(text).strip() for name, text in read_blocks("requests.txt")})
