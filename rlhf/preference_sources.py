"""Where preferences come from: requests for stories (built in), files, the Hub; and the formats in which they come.

chosen and rejected   texts beside a prompt (a text, or turns in prompt, messages or conversations)
                      a turn each, or lists of turns: the answer alone beside a prompt, or the whole conversation
                      texts with "\\n\\nHuman:" and "\\n\\nAssistant:", as in hh-rlhf
gold                  where there is one: true where the chosen answer is truly the better one, false, or null
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from random import Random

from engine.chat_template import Message
from engine.config import DataConfig
from engine.errors import InputError
from rlhf.preferences import Preference, judge
from train.data.files import Row, column_names, readable
from train.data.instruct_formats import MESSAGES, Conversation, read_turns
from train.data.sources import SPLITS, HubSource, Source, open_source
from train.data.stories import AskedFacts, forms, storybook
from train.data.story_requests import StoryRequest, story_requests
from train.data.story_score import score_story

STORIES_PREFERENCES = "stories-preferences"
STORY_PAIRS = {"train": 6_000, "validation": 500, "test": 500}
HUB_SETS = {
    "hh-rlhf": "Anthropic/hh-rlhf",
    "ultrafeedback_binarized": "HuggingFaceH4/ultrafeedback_binarized",
}
SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def open_preferences(data: DataConfig) -> Source:
    """The preferences that `data` names. Raises InputError where it names nothing."""
    if data.source == STORIES_PREFERENCES:
        return StoryPreferences(data.source, limit=data.documents)
    name = HUB_SETS.get(data.source, data.source)
    source = open_source(name, holdout=data.holdout, limit=data.documents, pick=read_preferences)
    return dataclasses.replace(source, stage="prefs") if isinstance(source, HubSource) else source


def read_preferences(rows: Iterable[Row]) -> Iterator[Preference | None]:
    """The preference that each row holds; None where it has no two answers to one prompt."""
    for where, row in rows:
        if not isinstance(row, Mapping) or not row.keys() >= {"chosen", "rejected"}:
            raise InputError(f"{where}: a preference has columns chosen and rejected; there are {column_names(row)}")
        gold = row.get("gold")
        if not (gold is None or isinstance(gold, bool)):
            raise InputError(f"{where}: gold is {gold!r}; it must be true, false or null")
        prompt = _turns(next((row[name] for name in ("prompt", *MESSAGES) if row.get(name)), None), "user", where)
        chosen, rejected = (_whole(prompt, _turns(row[name], "assistant", where)) for name in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1] or len(chosen) < 2 or {chosen[-1].role, rejected[-1].role} != {"assistant"}:
            yield None
        else:
            yield Preference(tuple(chosen[:-1]), chosen[-1].content, rejected[-1].content, gold)


def _turns(value: object, role: str, where: str) -> Conversation:
    """What stands in a cell as turns; a bare text is one by `role`."""
    if value is None or isinstance(value, str):
        text = readable(value) or ""
        if not SPEAKER.match(text):
            return [Message(role, text)] if value is not None else []
        _, *parts = SPEAKER.split(text)
        roles = ("user" if speaker == "Human" else "assistant" for speaker in parts[::2])
        return [Message(role, said.strip()) for role, said in zip(roles, parts[1::2], strict=True)]
    return next(read_turns([(where, [value] if isinstance(value, Mapping) else value)]))[1] or []


def _whole(prompt: Conversation, turns: Conversation) -> Conversation:
    """The prompt and the answer, where the turns are not the whole conversation already."""
    return turns if len(turns) > 1 else prompt + turns


@dataclasses.dataclass
class StoryPreferences(Source):
    """The built-in preferences: two answers to a request, as a noisy judge likes them."""

    def describe(self) -> str:
        return f"{self.name}: pairs of answers to requests for stories, judged by the program itself"

    def documents(self, split: str, start: int = 0) -> Iterator[Preference]:
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
        count = max(0, (self.limit or STORY_PAIRS[split]) - start)
        requests = story_requests(split, start)
        other = next(requests)
        for number, request in enumerate(islice(requests, count), start):
            rng = Random(f"preference {split} {number}")
            first, second = (answer(request, other, rng) for _ in range(2))
            scores = (score_story(request.facts, first).points, score_story(request.facts, second).points)
            yield judge([Message("user", request.text)], (first, second), scores, rng)
            other = request


def answer(request: StoryRequest, other: StoryRequest, rng: Random) -> str:
    """An answer to a request: the true one, or one that is worse in some way."""
    sentences, theirs = (re.split(r"(?<=[.!?]) ", each.story) for each in (request, other))
    match rng.choice(("true", "swapped", "swapped", "swapped", "other", "mixed", "cut", "repeated", "shuffled")):
        case "swapped":
            return swap(request.story, request.facts, rng)
        case "other":
            return other.story
        case "mixed":
            return " ".join(sentences[: len(sentences) // 2] + theirs[len(theirs) // 2 :])
        case "cut":
            return request.story[: rng.randrange(len(request.story))]
        case "repeated":
            return " ".join(sentence for sentence in sentences[:8] for _ in range(2))
        case "shuffled":
            words = request.story.split()
            at = rng.randrange(len(words))
            return " ".join(words[:at] + rng.sample(words[at:], len(words) - at))
    return request.story


def swap(story: str, facts: AskedFacts, rng: Random) -> str:
    """The story with some of what was asked for made something else."""
    book = storybook()
    kinds = [kind for rows in book.kinds.values() for row in rows for kind in row["kind"]]
    choices: dict[str | None, list[str]] = {
        facts.name: sorted({name for names in book.names.values() for name in names}),
        facts.kind: kinds,
        facts.trait: [trait for trait, _ in book.tempers],
        **dict.fromkeys(facts.words, sorted(book.forms)),
    }
    for word, instead in choices.items():
        if word and rng.random() < 0.5:
            said = "|".join(map(re.escape, sorted(forms(word), key=len, reverse=True)))
            story = re.sub(rf"\b(?:{said})\b", rng.choice(instead), story)
    return story
