"""Preferences: which of two answers to one prompt was liked better. Built in, from files and the Hub, or sampled.

chosen and rejected   texts beside a prompt: a text or turns in instruction, prompt, question, messages or conversations
                      a turn each, or lists of turns: what follows the prompt, or the whole conversation
                      texts with "\\n\\nHuman:" and "\\n\\nAssistant:", as in hh-rlhf
gold                  where there is one: true where the chosen answer is truly the better one, false, or null

What train.data.instruct_formats heeds or refuses beside a question, it does here as well.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, islice
from operator import attrgetter
from random import Random

from engine.chat_template import Message, answer_ends
from engine.config import DataConfig
from engine.errors import InputError
from engine.model import GPT
from rlhf.prompts import Prompts
from rlhf.reward_model import ProgramReward, Reward
from rlhf.rollout import roll_out
from train.data.instruct_formats import Conversation, are_turns, asked, turns_of, unwanted
from train.data.rows import MESSAGES, PROMPTS, Columns, Row, Skipped, cell, column_names, peek, text_of
from train.data.sources import SPLITS, HubSource, Source, open_source
from train.data.splits import prompt_key
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
# How surely the judge tells a better answer (a coin with sigma(difference / NOISE)), and how often it errs on top.
NOISE = 0.5
FLIPPED = 0.05


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to a conversation that ends with its question. `gold`: is the chosen one truly better, if known?"""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    gold: bool | None = None

    @property
    def key(self) -> Sequence[str]:
        """What preferences must not have in common on both sides of a split: the prompt."""
        return prompt_key(self.prompt)

    def to_json_line(self) -> str:
        """Return the line of a file that read_preferences reads as this preference."""
        turns = [{"role": message.role, "content": message.content} for message in self.prompt]
        prompt = turns[0]["content"] if len(turns) == 1 else turns
        row = {"prompt": prompt, "chosen": self.chosen, "rejected": self.rejected, "gold": self.gold}
        return json.dumps(row, ensure_ascii=False) + "\n"


def prefer(prompt: Sequence[Message], answers: Sequence[str], scores: Sequence[float], rng: Random) -> Preference:
    """Let a noisy judge choose between two answers whose true scores are known, in points: one for each fact met."""
    difference = scores[0] - scores[1]
    first = (rng.random() < 1 / (1 + math.exp(-difference / NOISE))) != (rng.random() < FLIPPED)
    chosen, rejected = answers if first else answers[::-1]
    return Preference(tuple(prompt), chosen, rejected, (difference > 0) == first if difference else None)


def open_preferences(data: DataConfig) -> Source:
    """Open the preferences that `data` names. Raises InputError where it names nothing."""
    if data.source == STORIES_PREFERENCES:
        return StoryPreferences(data.source, limit=data.documents)
    name, pick = HUB_SETS.get(data.source, data.source), partial(read_preferences, data=data)
    source = open_source(name, holdout=data.holdout, limit=data.documents, pick=pick, key=attrgetter("key"))
    return dataclasses.replace(source, stage="prefs") if isinstance(source, HubSource) else source


def read_preferences(rows: Iterable[Row], data: DataConfig = DataConfig()) -> Iterator[Preference | Skipped]:  # noqa: B008
    """Read the preference that each row holds, in the columns that `data` names or in the usual ones."""
    head, rows = peek(rows)
    columns = Columns(head)
    of_turns = [name for name in MESSAGES if columns.holds(name, list)]
    prompt = data.prompt_column or columns.first(PROMPTS, str, list) or next(iter(of_turns), None)
    answers = [data.chosen_column or "chosen", data.rejected_column or "rejected"]
    for where, row in rows:
        if not isinstance(row, Mapping) or not row.keys() >= {*answers}:
            raise InputError(
                f"{where}: a preference has columns {' and '.join(answers)}; there are {column_names(row)}: name them "
                "with --chosen-column and --rejected-column"
            )
        gold = row.get("gold")
        if not (gold is None or isinstance(gold, bool)):
            raise InputError(f"{where}: gold is {gold!r}; it must be true, false or null")
        if data.prompt_column:
            cell(row, data.prompt_column, where)
        said = asked(row, prompt, where, partial(_turns, role="user", where=where))
        told = [_turns(row[name], "assistant", where) for name in answers]
        if said and said[-1].role == "assistant" and not said[-1].content:
            said.pop()  # "\n\nAssistant:", after which the answers begin, with a space
            told = [[Message(turn.role, turn.content.strip()) for turn in turns] for turns in told]
        skipped, both = unwanted(row, where), [_whole(said, turns) for turns in told]
        if any(row[name] is None for name in answers):
            skipped = skipped or Skipped(where, "without an answer")
        yield skipped or _preference(both, gold) or Skipped(where, "not two answers to one prompt")


def _turns(value: object, role: str, where: str) -> Conversation:
    """Read a cell as turns; a bare text is one by `role`, or several where it names its speakers."""
    if value is None:
        return []
    if isinstance(value, Mapping) or are_turns(value):
        return turns_of(value, where)
    text = text_of(value, where)
    if not SPEAKER.match(text):
        return [Message(role, text)]
    _, *parts = SPEAKER.split(text)
    roles = ("user" if speaker == "Human" else "assistant" for speaker in parts[::2])
    return [Message(role, said.strip()) for role, said in zip(roles, parts[1::2], strict=True)]


def _whole(said: Conversation, turns: Conversation) -> Conversation | None:
    """Join a prompt and what follows it, unless the turns begin with the prompt themselves.

    None where they begin with another one.
    """
    if not said or not turns or turns[0].role == "assistant":
        return said + turns
    system = [message for message in said if message.role == "system"]
    bare = [message for message in turns if message.role != "system"]
    own = [message for message in turns if message.role == "system"] or system
    for question, repeated in zip(said[len(system) :], bare, strict=False):
        if (question.role, question.content.strip()) != (repeated.role, repeated.content.strip()):
            return None
    return own + bare


def _preference(both: Sequence[Conversation | None], gold: bool | None) -> Preference | None:
    """Make a preference of two conversations; None where they differ in more than their last answers."""
    chosen, rejected = both
    if not chosen or not rejected or chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        return None
    if {chosen[-1].role, rejected[-1].role} != {"assistant"} or chosen[-2].role != "user":
        return None
    return Preference(tuple(chosen[:-1]), chosen[-1].content, rejected[-1].content, gold)


@dataclasses.dataclass
class StoryPreferences(Source):
    """The built-in preferences: two answers to a request, as a noisy judge likes them."""

    held_out_by: str = "heroes of a kind and trait that no training request names together"

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
            answers = [write_answer(request, other, rng) for _ in range(2)]
            points = [score_story(request.facts, answer).points for answer in answers]
            yield prefer([Message("user", request.text)], answers, points, rng)
            other = request


def write_answer(request: StoryRequest, other: StoryRequest, rng: Random) -> str:
    """Write an answer to a request: the true one, or one that is worse in some way."""
    sentences, theirs = (re.split(r"(?<=[.!?]) ", each.story) for each in (request, other))
    match rng.choice(("true", "swapped", "swapped", "swapped", "other", "mixed", "cut", "repeated", "shuffled")):
        case "swapped":
            return swap_facts(request.story, request.facts, rng)
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


def swap_facts(story: str, facts: AskedFacts, rng: Random) -> str:
    """Make some of what was asked for something else."""
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


@dataclasses.dataclass(frozen=True)
class SampledPairs:
    """Pairs, and what was left out: two answers of one text or one score, and answers that did not end."""

    pairs: list[Preference]
    same: int
    ties: int
    unfinished: int
    scores: list[float]  # of all answers

    def describe(self) -> str:
        answers = len(self.scores)
        known = [pair.gold for pair in self.pairs if pair.gold is not None]
        right = f"; the judge is right about {sum(known) / len(known):.1%}" if known else ""
        return (
            f"{len(self.pairs):,} pairs of {answers:,} answers, mean score {sum(self.scores) / answers:.3f}{right}; "
            f"left out: {self.ties:,} ties, {self.same:,} of equal texts, {self.unfinished:,} answers that did not end"
        )


def sample_pairs(
    model: GPT,
    prompts: Prompts,
    reward: Reward,
    *,
    answers: int = 2,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda answers, tokens: None,
) -> SampledPairs:
    """Draw several answers of a model to each prompt, and let a noisy judge of their rewards compare every two of them.

    `gold` is known where the program itself gives the reward. The same seed gives the same pairs.
    """
    tokenizer, ends = prompts.tokenizer, answer_ends(prompts.tokenizer)
    repeated = [prompt for prompt in prompts.first(len(prompts)) for _ in range(answers)]
    rollout = roll_out(model, repeated, ends, temperature=temperature, seed=seed, progress=progress)
    texts = [tokenizer.decode([token for token in answer if token not in ends]) for answer in rollout.answers]
    ended = rollout.ended.tolist()
    knows_gold = isinstance(reward, ProgramReward)
    if isinstance(reward, ProgramReward):
        found = reward.scores(repeated, rollout.answers)
        scores, points = [score.total for score in found], [score.points for score in found]
    else:
        scores = points = reward(repeated, rollout.answers).tolist()
    rng, pairs, same, ties = Random(f"pairs {seed}"), [], 0, 0
    for number, messages in enumerate(prompts.asked):
        # An answer that was cut short would look as if it ended there.
        whole = [row for row in range(number * answers, (number + 1) * answers) if ended[row]]
        for one, other in combinations(whole, 2):
            if texts[one] == texts[other]:
                same += 1
            elif points[one] == points[other]:
                ties += 1
            else:
                pair = prefer(messages, (texts[one], texts[other]), (points[one], points[other]), rng)
                pairs.append(pair if knows_gold else dataclasses.replace(pair, gold=None))
    return SampledPairs(pairs, same, ties, ended.count(False), scores)
