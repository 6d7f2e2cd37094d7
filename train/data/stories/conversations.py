"""Conversations about brief stories: each request is for a new story, or for a change to the last one.

A change is another ending or another hero, which the request names or leaves open. Its answer is the last story, told
again with this alone changed. Asked for is what the conversation has asked for so far, with the change applied, so that
an answer is scored as one to a single request. Everything follows from (number, split), and every hero belongs to the
split.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count, islice
from random import Random

from train.data.stories.requests import ASKED_BRIEF, StoryRequest, fitting_seeds, misheard, phrase, write_request
from train.data.stories.writer import AskedFacts, Casting, storybook, write_story

TURNS = (1, 2, 3, 4)  # a conversation has one of these numbers; four brief stories fit into 256 tokens
NEW = 1 / 4  # the share of later requests that are for a new story
HERO = ("name", "kind", "trait")
CHANGES = ("new_ending", "new_ending", "new_hero", "new_hero", "other_ending", "other_hero")


def story_conversations(split: str, start: int = 0, *, turns: int | None = None) -> Iterator[list[StoryRequest]]:
    """Yield the conversations of a split from number `start` on, without end: of so many turns, or of one to four."""
    seeds, rngs = fitting_seeds(split), (Random(f"conversation {split} {number}") for number in count())
    return islice((_conversation(split, turns or rng.choice(TURNS), seeds, rng) for rng in rngs), start, None)


def _conversation(split: str, turns: int, seeds: Iterator[int], rng: Random) -> list[StoryRequest]:
    told: list[StoryRequest] = []
    while len(told) < turns:
        if not told or rng.random() < NEW:
            seed, instead = next(seeds), dict[str, str]()
            told.append(write_request(seed, split, brief=True))
        else:
            story = write_story(seed, split, brief=True, instead=instead)
            text, facts, changes = _change(story.facts, told[-1].facts, split, seeds, rng)
            instead = {**instead, **changes}
            told.append(StoryRequest(text, facts, write_story(seed, split, brief=True, instead=instead).text))
    return told


def _change(
    story: AskedFacts, asked: AskedFacts, split: str, seeds: Iterator[int], rng: Random
) -> tuple[str, AskedFacts, Mapping[str, str]]:
    """Ask for a change to a story of whose facts some were asked for.

    Return the request, what is asked for from now on, and the entries of the cast to change.
    """
    what = rng.choice(CHANGES)
    facts: tuple[str, ...] = HERO if what.endswith("hero") else ("mood",)
    moods = storybook().choices["mood"]
    casts: Iterable[Mapping[str, str]] = ({"mood": mood} for mood in rng.sample(moods, len(moods)))
    if facts == HERO:
        casts = (Casting(seed, split).cast for seed in seeds)
    known = {getattr(some, fact) for some in (story, asked) for fact in facts}
    changes = next(cast for cast in casts if known.isdisjoint(cast[fact] for fact in facts))
    before = {fact: getattr(asked, fact) for fact in facts}
    now, unlike = dict.fromkeys(facts), before
    if what.startswith("new") or not any(before.values()):
        what = what.replace("other", "new")
        named = {fact for fact in facts if rng.random() < ASKED_BRIEF[fact]} or {"kind"}
        named |= {"kind", "trait"} if split != "train" else set()
        now, unlike = {fact: changes[fact] if fact in named else None for fact in facts}, now
    new = replace(asked, **now, unlike=replace(asked.unlike or AskedFacts(), **unlike))  # type: ignore[arg-type]
    if split == "train":
        new = misheard(new, rng, [fact for fact, value in now.items() if value])
    return phrase(AskedFacts(**{fact: getattr(new, fact) for fact in facts}), rng, what), new, changes
