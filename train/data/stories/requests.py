"""The built-in instructions: requests for stories, each with the story that answers it and the facts it asks for.

Everything follows from (seed, split), as the stories do. One (kind, trait) pair in ten is held out: no training request
or answer is about such a hero, while every held-out request names one, and its story is of a held-out split itself. So
what the held-out requests ask for was asked for in no training request, and no model has read their stories. Brief
stories answer training requests carelessly, held-out ones to the letter.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from random import Random

from train.data.stories.grammar import Cast, tell
from train.data.stories.writer import AskedFacts, Casting, storybook, write_story

# A request says each of these with this probability.
ASKED = {"name": 0.6, "kind": 0.85, "trait": 0.75, "words": 0.65, "mood": 0.6, "length": 0.35}
# Brief stories are for what is learnt in minutes: to use any word that is asked for is not, to keep to a mood is.
ASKED_BRIEF = ASKED | {"words": 0.0, "mood": 1.0, "length": 1.0}
# A brief story that answers a training request leaves each of its facts to chance so often. Demonstrations are seldom
# perfect, and alignment is for what a model can do better. Held-out requests are answered by their very stories.
CARELESS = 0.2


@dataclass(frozen=True)
class StoryRequest:
    """A request, the facts that it asks for, and the story that answers it."""

    text: str
    facts: AskedFacts
    story: str


def story_requests(split: str, start: int = 0, *, brief: bool = False) -> Iterator[StoryRequest]:
    """Yield the requests of a split from number `start` on, without end: for stories, or for brief ones."""
    casts = ((seed, Casting(seed, split).cast) for seed in count())
    fitting = (seed for seed, cast in casts if is_held_out_pair(cast["kind"], cast["trait"]) == (split != "train"))
    return islice((_request(seed, split, brief) for seed in fitting), start, None)


def is_held_out_pair(kind: str, trait: str) -> bool:
    """Return whether no training request or answer is about such a hero."""
    rank = storybook().rank
    return (3 * rank[kind] + rank[trait]) % 10 == 0


def _request(seed: int, split: str, brief: bool) -> StoryRequest:
    story, rng = write_story(seed, split, brief=brief), Random(f"{split} {seed}")
    asked = {fact for fact, likely in (ASKED_BRIEF if brief else ASKED).items() if rng.random() < likely}
    if split != "train":
        asked |= {"kind", "trait"}
    facts = AskedFacts(**{fact: getattr(story.facts, fact) for fact in asked})
    if brief and split == "train":
        facts = _misheard(facts, rng)
    return StoryRequest(phrase(facts, rng), facts, story.text)


def _misheard(facts: AskedFacts, rng: Random) -> AskedFacts:
    """Return facts to ask for that somebody careless answers with a story of these: now and then one is another."""
    book = storybook()
    choices = {**book.heroes, "mood": sorted(set(book.moods.values()))}
    while True:
        others = {
            fact: rng.choice(some)
            for fact, some in choices.items()
            if getattr(facts, fact) is not None and rng.random() < CARELESS
        }
        asked = replace(facts, **others)  # type: ignore[arg-type]
        if not (asked.kind and asked.trait and is_held_out_pair(asked.kind, asked.trait)):
            return asked


def phrase(facts: AskedFacts, rng: Random) -> str:
    """Write a request for a story with these facts, in words drawn at random."""
    *others, last = facts.words or ("",)
    said = {
        "kind": facts.kind or "",
        "trait": facts.trait or "",
        "name": facts.name or "",
        "words": f"{', '.join(others)} and {last}" if others else last,
    }
    hero = "".join(key[0] for key in ("kind", "trait", "name") if said[key])
    tags = [hero, "hero" if hero else "", facts.mood, facts.length, ("", "word", "words")[min(len(facts.words), 2)]]
    text = tell(storybook().request, Cast(said), frozenset(tag for tag in tags if tag), rng.random, 1.0)
    # A sentence that nothing asks for leaves its full stop behind.
    return re.sub(r"^\W+|(?<=[.?])[. ]*\.", "", text)
