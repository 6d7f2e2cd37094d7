"""Requests for stories, each with the story that answers it; and a score of how well any text answers one.

Everything follows from (seed, split), as the stories do. One (kind, trait) pair in ten is held out: no training request
or answer is about such a hero, while every held-out request names one, and its story is of a held-out split itself. So
what the held-out requests ask for was asked for in no training request, and no model has read their stories. Brief
stories answer training requests carelessly, held-out ones to the letter.

The score is a reward that can be checked, and an evaluation. It is the share of what was asked for that the text meets,
times its soundness: is it a story at all? Without the second, a list of the words asked for would be the best answer;
and a word counts only between neighbours that it has in true stories, so that a list inside another story does little.
All of it is in [0, 1]; a true story scores about 0.99.
"""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice, pairwise
from random import Random

from train.data.stories.grammar import Cast, plural, tell
from train.data.stories.writer import WORD, AskedFacts, Casting, length_of, stories, storybook, write_story

# A request says each of these with this probability.
ASKED = {"name": 0.6, "kind": 0.85, "trait": 0.75, "words": 0.65, "mood": 0.6, "length": 0.35}
# Brief stories are for what is learnt in minutes: to use any word that is asked for is not, to keep to a mood is.
ASKED_BRIEF = ASKED | {"words": 0.0, "mood": 1.0, "length": 1.0}
# A brief story that answers a training request leaves each of its facts to chance so often. Demonstrations are seldom
# perfect, and alignment is for what a model can do better. Held-out requests are answered by their very stories.
CARELESS = 0.2
HEARD = ("name", "kind", "trait", "mood")

TOKEN = re.compile(r"[A-Za-z']+|[.!?]")
# In a true story 93% or more of the neighbouring words are neighbours in these stories, and shuffled 24%.
KNOWN_STORIES, KNOWN_BRIEF = 1500, 4500
FLUENT, BRIEF_FLUENT = (0.4, 0.8), (0.6, 0.9)
# In a true story 96% or more of the groups of three words are said for the first time.
FRESH = (0.5, 0.9)
# These are numbers of words. Stories have 70 to 240, brief ones 20 to 45.
LEAST, ENOUGH, MOST = 10, 50, 260
BRIEF_ENOUGH, BRIEF_TOO_LONG = (8, 20), (50, 70)
ENDS = (".", "!", "?", '."', '!"', '?"')
ENDING_WORDS = 40  # the number of last words that tell the mood


@dataclass(frozen=True)
class StoryRequest:
    """A request, the facts that it asks for, and the story that answers it."""

    text: str
    facts: AskedFacts
    story: str


def story_requests(split: str, start: int = 0, *, brief: bool = False) -> Iterator[StoryRequest]:
    """Yield the requests of a split from number `start` on, without end: for stories, or for brief ones."""
    return islice((write_request(seed, split, brief=brief) for seed in fitting_seeds(split)), start, None)


def fitting_seeds(split: str) -> Iterator[int]:
    """Yield the numbers of the stories whose heroes a split may ask for."""
    casts = ((seed, Casting(seed, split).cast) for seed in count())
    return (seed for seed, cast in casts if is_held_out_pair(cast["kind"], cast["trait"]) == (split != "train"))


def is_held_out_pair(kind: str, trait: str) -> bool:
    """Return whether no training request or answer is about such a hero."""
    rank = storybook().rank
    return (3 * rank[kind] + rank[trait]) % 10 == 0


def write_request(seed: int, split: str, *, brief: bool) -> StoryRequest:
    """Write the request that story number `seed` of a split answers."""
    story, rng = write_story(seed, split, brief=brief), Random(f"{split} {seed}")
    asked = {fact for fact, likely in (ASKED_BRIEF if brief else ASKED).items() if rng.random() < likely}
    if split != "train":
        asked |= {"kind", "trait"}
    facts = AskedFacts(**{fact: getattr(story.facts, fact) for fact in asked})
    if brief and split == "train":
        facts = misheard(facts, rng)
    return StoryRequest(phrase(facts, rng), facts, story.text)


def misheard(facts: AskedFacts, rng: Random, only: Collection[str] = HEARD) -> AskedFacts:
    """Return facts to ask for that somebody careless answers with a story of these: now and then one is another."""
    choices = {fact: storybook().choices[fact] for fact in only}
    while True:
        others = {
            fact: rng.choice(some)
            for fact, some in choices.items()
            if getattr(facts, fact) is not None and rng.random() < CARELESS
        }
        asked = replace(facts, **others)  # type: ignore[arg-type]
        if not (asked.kind and asked.trait and is_held_out_pair(asked.kind, asked.trait)):
            return asked


def phrase(facts: AskedFacts, rng: Random, change: str = "") -> str:
    """Write a request for a story with these facts, or for that `change` to the last one, in words drawn at random."""
    *others, last = facts.words or ("",)
    said = {
        "kind": facts.kind or "",
        "trait": facts.trait or "",
        "name": facts.name or "",
        "words": f"{', '.join(others)} and {last}" if others else last,
    }
    hero = "".join(key[0] for key in ("kind", "trait", "name") if said[key])
    tags = [hero, "hero" if hero else "", facts.mood, facts.length, ("", "word", "words")[min(len(facts.words), 2)]]
    parts, tags = (storybook().change, [*tags, change]) if change else (storybook().request, tags)
    text = tell(parts, Cast(said), frozenset(tag for tag in tags if tag), rng.random, 1.0)
    # A sentence that nothing asks for leaves its full stop behind.
    text = re.sub(r"^\W+|(?<=[.?])[. ]*\.", "", text)
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class StoryScore:
    """`met` says which facts the text meets, `sound` in how far it is a story: fluent, fresh, of a fair size, ended."""

    met: dict[str, bool]
    sound: dict[str, float]

    @property
    def points(self) -> float:
        """The number of facts met, times the soundness."""
        return sum(self.met.values()) * math.prod(self.sound.values())

    @property
    def total(self) -> float:
        return self.points / len(self.met) if self.met else math.prod(self.sound.values())


def score_story(facts: AskedFacts, text: str) -> StoryScore:
    """Score a text as the answer to a request for these facts. Over a thousand a second, after the first."""
    spelled = TOKEN.findall(text)
    words, brief = _classed(spelled), facts.length == "brief"
    stories_say = _known_pairs(brief=brief)
    known = [pair in stories_say for pair in pairwise(words)]
    triples = list(zip(words, words[1:], words[2:], strict=False))
    size = _ramp(len(words), LEAST, ENOUGH) * min(1.0, MOST / max(len(words), 1))
    if brief:
        size = _ramp(len(words), *BRIEF_ENOUGH) * (1.0 - _ramp(len(words), *BRIEF_TOO_LONG))
    sound = {
        "fluent": _ramp(sum(known) / max(len(known), 1), *(BRIEF_FLUENT if brief else FLUENT)),
        "fresh": _ramp(len(set(triples)) / max(len(triples), 1), *FRESH),
        "size": size,
        "ended": 1.0 if text.rstrip().endswith(ENDS) else 0.7,
    }
    used = [word for word, *fits in zip(spelled, [True, *known], [*known, True], strict=False) if all(fits)]
    in_use = check_facts(" ".join(used), AskedFacts(facts.name, facts.kind, facts.trait, facts.words))
    return StoryScore(check_facts(text, facts) | in_use, sound)


def check_facts(text: str, facts: AskedFacts) -> dict[str, bool]:
    """Return which facts a text meets: name, kind, trait, each asked word as `word:lamp`, mood and length.

    A word counts in every form that the stories use: lamp, lamps; sing, sang, singing. A brief text is short, too.
    What is None is not checked. `other name` is met where the name is not the one that the story must be unlike.
    """
    present = set(WORD.findall(text))
    lowered = {word.lower() for word in present}
    length = length_of(text)
    checks = {
        "name": facts.name in present,
        "kind": facts.kind is not None and not lowered.isdisjoint(forms(facts.kind)),
        "trait": facts.trait in lowered,
        "mood": mood_of(text) == facts.mood,
        "length": facts.length in (length, "short" if length == "brief" else length),
    }
    asked = {fact: met for fact, met in checks.items() if getattr(facts, fact) is not None}
    unlike = check_facts(text, facts.unlike) if facts.unlike else {}
    asked |= {f"other {fact}": not met for fact, met in unlike.items()}
    return asked | {f"word:{word}": not lowered.isdisjoint(forms(word)) for word in facts.words}


def forms(word: str) -> set[str]:
    """Return the forms in which stories use a word."""
    return storybook().forms.get(word) or {word, plural(word)}


def mood_of(text: str) -> str | None:
    """Return the mood in which a text ends, None where its last words give no cue."""
    ending, moods = reversed(WORD.findall(text.lower())[-ENDING_WORDS:]), storybook().moods
    return next((moods[word] for word in ending if word in moods), None)


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _classed(words: list[str]) -> list[str]:
    """Return the words in lower case, with all names as one word and all kinds as another."""
    classes = storybook().classes
    return [classes.get(word) or classes.get(word.lower()) or word.lower() for word in words]


@cache
def _known_pairs(*, brief: bool) -> set[tuple[str, str]]:
    """Return the neighbours in long stories, and also those in brief ones where the answer is to be brief."""
    known = set(_known_pairs(brief=False)) if brief else set()
    for story in stories("train", 0, KNOWN_BRIEF if brief else KNOWN_STORIES, brief=brief):
        known.update(pairwise(_classed(TOKEN.findall(story.text))))
    return known
