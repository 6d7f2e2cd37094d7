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

from train.data.stories.grammar import plural
from train.data.stories.writer import WORD, AskedFacts, length_of, stories, storybook

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
ENDING_WORDS = 40  # so many last words tell the mood


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
    What is None is not checked.
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
    classes = _classes()
    return [classes.get(word) or classes.get(word.lower()) or word.lower() for word in words]


@cache
def _classes() -> dict[str, str]:
    heroes = storybook().heroes
    return dict.fromkeys(heroes["kind"], "Kind") | dict.fromkeys(heroes["name"], "Name")


@cache
def _known_pairs(*, brief: bool) -> set[tuple[str, str]]:
    """Return the neighbours in long stories, and also those in brief ones where the answer is to be brief."""
    known = set(_known_pairs(brief=False)) if brief else set()
    for story in stories("train", 0, KNOWN_BRIEF if brief else KNOWN_STORIES, brief=brief):
        known.update(pairwise(_classed(TOKEN.findall(story.text))))
    return known
