"""How well a text answers a request for a story, judged by a program: a reward that can be checked, and an evaluation.

The score is the share of what was asked for that the text meets, times its soundness: is it a story at all? Without the
second, a list of the words asked for would be the best answer; and a word counts only between neighbours that it has in
true stories, so that a list inside another story does little. All in [0, 1]; a true story scores about 0.99.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from train.data.stories import AskedFacts, StoryFacts, check_facts, stories, storybook

TOKEN = re.compile(r"[A-Za-z']+|[.!?]")
# Of a true story, 93% of the neighbouring words or more are neighbours in these stories; of its words shuffled, 24%.
KNOWN_STORIES, KNOWN_BRIEF = 1500, 4500
FLUENT, BRIEF_FLUENT = (0.4, 0.8), (0.6, 0.9)
# The share of groups of three words that are said for the first time: 96% or more of a true story.
FRESH = (0.5, 0.9)
# In words. Stories have 70 to 240, brief ones 20 to 45.
LEAST, ENOUGH, MOST = 10, 50, 260
BRIEF_ENOUGH, BRIEF_TOO_LONG = (8, 20), (50, 70)
ENDS = (".", "!", "?", '."', '!"', '?"')


@dataclass(frozen=True)
class StoryScore:
    """`met` says which facts the text meets, `sound` in how far it is a story: fluent, fresh, of a fair size, ended."""

    met: dict[str, bool]
    sound: dict[str, float]

    @property
    def points(self) -> float:
        """One for each fact met, times the soundness."""
        return sum(self.met.values()) * math.prod(self.sound.values())

    @property
    def total(self) -> float:
        return self.points / len(self.met) if self.met else math.prod(self.sound.values())


def score_story(facts: AskedFacts | StoryFacts, text: str) -> StoryScore:
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


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _classed(words: list[str]) -> list[str]:
    """In lower case, all names as one word and all kinds as another: any may stand where one does."""
    names, kinds = _characters()
    lowered = [word.lower() for word in words]
    return [
        "Name" if word in names else "Kind" if low in kinds else low for word, low in zip(words, lowered, strict=True)
    ]


@cache
def _characters() -> tuple[frozenset[str], frozenset[str]]:
    book = storybook()
    kinds = (kind for rows in book.kinds.values() for row in rows for kind in row["kind"])
    return frozenset(name for some in book.names.values() for name in some), frozenset(kinds)


@cache
def _known_pairs(*, brief: bool) -> set[tuple[str, str]]:
    """The neighbours in long stories, and also those in brief ones where the answer is to be brief."""
    known = set(_known_pairs(brief=False)) if brief else set()
    for story in stories("train", 0, KNOWN_BRIEF if brief else KNOWN_STORIES, brief=brief):
        known.update(pairwise(_classed(TOKEN.findall(story.text))))
    return known
