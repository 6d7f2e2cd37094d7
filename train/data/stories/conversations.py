"""Conversations about brief stories: each request is for a new story, or for a change to the last one.

A change is another ending, another hero, or another name, kind or trait of the hero; a request names it, or leaves it
open. Its answer is the last story, told again with this alone changed. Asked for is what the conversation has asked for
so far, with the change applied, so that an answer is scored as one to a single request. Everything follows from
(number, split); the hero of a changed story belongs to the split, too, as do the kind and trait that are asked for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count, islice
from random import Random

from train.data.stories.requests import (
    ASKED_BRIEF,
    StoryRequest,
    fitting_seeds,
    is_held_out_pair,
    misheard,
    phrase,
    write_request,
)
from train.data.stories.writer import AskedFacts, Casting, split_of, storybook, write_story

MOST_TURNS = 4  # of brief stories, so many fit into 256 tokens
NEW = 1 / 3  # the share of later requests that are for a new story
HERO = ("name", "kind", "trait")
CHANGES = ("ending", "other_ending", "name", "kind", "trait", "new_hero", "other_hero")
# A child that becomes a fox can keep its name, but not every fox that becomes a child.
OWN_NAMES = ("girl", "boy", "robot")


def story_conversations(split: str, start: int = 0, *, turns: int | None = None) -> Iterator[list[StoryRequest]]:
    """Yield the conversations of a split from number `start` on, without end: of so many turns, or of one to four."""
    seeds, rngs = fitting_seeds(split), (Random(f"conversation {split} {number}") for number in count())
    return islice((_conversation(split, turns or rng.randint(1, MOST_TURNS), seeds, rng) for rng in rngs), start, None)


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
) -> tuple[str, AskedFacts, dict[str, str]]:
    """Ask for a change to a story of whose facts some were asked for.

    Return the request, what is asked for from now on, and the entries of the cast to change.
    """
    what = rng.choice(CHANGES)
    if not {"other_ending": asked.mood, "other_hero": asked.name or asked.kind or asked.trait}.get(what, True):
        what = "ending"  # any other one was asked for already
    changes: dict[str, str]
    if what in ("new_hero", "other_hero"):
        casts = (Casting(seed, split).cast for seed in seeds)
        changes = next(cast for cast in casts if all(cast[fact] not in _said(fact, story, asked) for fact in HERO))
        named = {fact for fact in HERO if rng.random() < ASKED_BRIEF[fact]} or {"kind"}
        named |= {"kind", "trait"} if split != "train" else set()
        now = {fact: changes[fact] if fact in named else None for fact in HERO}
    else:
        fact = what if what in HERO else "mood"
        if not (others := _others(fact, story, asked, split)):
            what, fact, others = "ending", "mood", _others("mood", story, asked, split)
        changes = {fact: rng.choice(others)}
        now = {**changes}
    if what.startswith("other"):
        unlike, now = {fact: getattr(asked, fact) for fact in now}, dict.fromkeys(now)
    else:
        unlike = dict.fromkeys(now)
    facts = replace(asked, **now, unlike=replace(asked.unlike or AskedFacts(), **unlike))  # type: ignore[arg-type]
    if split == "train":
        facts = misheard(facts, rng, [fact for fact, value in now.items() if value])
    return phrase(AskedFacts(**{fact: getattr(facts, fact) for fact in now}), rng, what), facts, changes


def _said(fact: str, *some: AskedFacts) -> list[str | None]:
    return [getattr(facts, fact) for facts in some]


def _others(fact: str, story: AskedFacts, asked: AskedFacts, split: str) -> list[str]:
    """Return what a fact of a story can become: neither what it is nor what was asked for."""
    book, values = storybook(), storybook().choices[fact]
    if fact == "name":
        values = next(names for names in book.names.values() if story.name in names)
    if fact == "kind":
        values = [] if story.kind == "robot" else [kind for kind in values if kind not in OWN_NAMES]
    hero = {each: getattr(story, each) for each in HERO}
    fresh = (value for value in values if value not in _said(fact, story, asked))
    return [value for value in fresh if _belongs({**hero, fact: value}, split)]


def _belongs(hero: Mapping[str, str], split: str) -> bool:
    kind, trait = hero["kind"], hero["trait"]
    return split_of(hero["name"], kind, trait) == split and is_held_out_pair(kind, trait) == (split != "train")
