"""The built-in data: children's stories without end, each with facts that a program can check.

The folder storybook holds the words, the phrases and the plots; story_grammar.py is the language they are written in.
Brief stories, of three sentences, have plots of their own, and the heroes of the long stories of the same numbers.
Everything about a story follows from (seed, split). The first name, kind and trait in a story are its hero's, and they
decide its split: no text can come out of two splits, while the held-out stories are made of the same words.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count as count_from
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

from train.data.story_grammar import Cast, Parts, join_lines, parse, plural, tell

STORYBOOK = Path(__file__).with_name("storybook")
SPLITS = ("train", "validation", "test")

# The last cue among the final words of a story tells its mood; so no cue serves two moods.
MOOD_CUES = {
    "happy": ("happy", "happier", "happily", "smile", "smiled", "smiling", "glad", "joy", "cheered", "beamed"),
    "sad": ("sad", "sadly", "sigh", "sighed", "tear", "tears", "lonely"),
    "funny": ("laugh", "laughed", "laughing", "giggle", "giggled", "silly", "silliest", "funny", "funniest"),
    "wise": ("learn", "learned", "lesson", "understand", "understood", "wiser"),
}
MOOD_OF_CUE = {cue: mood for mood, cues in MOOD_CUES.items() for cue in cues}
ENDING_WORDS = 40

SHORT, MEDIUM, LONG = 46, 100, 170  # the fewest words of such a story; a brief one has fewer
KEEP = (0.0, 0.0, 0.0, 0.3, 0.5, 0.7, 1.0, 1.0, 1.0)  # shares of the optional texts to keep; each story draws one

HERO_GROUPS = ("child",) * 5 + ("animal",) * 5 + ("creature",)
FRIEND_GROUPS = {
    "child": ("child", "child", "animal"),
    "animal": ("animal",),
    "creature": ("child", "animal", "creature"),
}
NOT_ASKED = {"mood", "moral", "how", "trouble"}  # slots whose words the story need not contain
TOO_COMMON = {"little", "old", "new"}
WORD = re.compile("[A-Za-z]+")

T = TypeVar("T")
Row = dict[str, list[str]]  # cast key: the words it may take


@dataclass(frozen=True)
class StoryFacts:
    """What can be asked of a story. `words` are content words in base form; `plot` is the one fact not checked."""

    name: str
    kind: str
    trait: str
    words: tuple[str, ...]
    mood: str
    length: str
    plot: str


@dataclass(frozen=True)
class AskedFacts:
    """What is asked of a story: some of its facts. None, or no words: that is left open."""

    name: str | None = None
    kind: str | None = None
    trait: str | None = None
    words: tuple[str, ...] = ()
    mood: str | None = None
    length: str | None = None


@dataclass(frozen=True)
class Story:
    text: str
    facts: StoryFacts


class Plot(NamedTuple):
    name: str
    slots: list[list[Row]]
    tag_keys: list[str]  # the cast entries that the plot may test with @
    parts: Parts


class Storybook(NamedTuple):
    """All that the storyteller knows."""

    plots: list[Plot]
    brief_plots: list[Plot]
    names: dict[str, list[str]]
    pronouns: dict[str, Row]
    kinds: dict[str, list[Row]]
    elders: dict[str, list[Row]]
    tempers: list[tuple[str, str]]
    rank: dict[str, int]  # of names, of kinds, and of traits
    forms: dict[str, set[str]]  # of each word that a story can be asked to use
    base_form: dict[str, str]


@cache
def storybook() -> Storybook:
    phrases = {name: join_lines(text).strip() for name, text in read_blocks("phrases.txt")}
    tables = {name: read_table(text) for name, text in read_blocks("words.txt")}
    plots, brief_plots = (
        [read_plot(path, tables, phrases) for path in sorted((STORYBOOK / folder).glob("*.txt"))]
        for folder in ("plots", "brief")
    )
    names = {row["pronoun"][0]: row["name"] for row in tables["names"]}
    names |= {f"pet {pronoun}": names[pronoun] + names[f"pet {pronoun}"] for pronoun in ("she", "he")}
    kinds = {group: [row for row in tables["kinds"] if row["group"] == [group]] for group in FRIEND_GROUPS}
    tempers = [(trait, row["temper"][0]) for row in tables["traits"] for trait in row["trait"]]
    ranked = (
        sorted({name for some in names.values() for name in some}),
        sorted({kind for row in tables["kinds"] for kind in row["kind"]}),
        [trait for trait, _ in tempers],
    )
    forms = dict(pair for plot in plots for rows in plot.slots for row in rows for pair in askable_words(row))
    return Storybook(
        plots=plots,
        brief_plots=brief_plots,
        names=names,
        pronouns={row["he"][0]: row for row in tables["pronouns"]},
        kinds=kinds,
        elders={table: tables[table] for table in ("family", "makers")},
        tempers=tempers,
        rank={word: rank for words in ranked for rank, word in enumerate(words)},
        forms=forms,
        base_form={form: word for word in forms for form in forms[word]},
    )


def read_blocks(file: str) -> list[tuple[str, str]]:
    """(name, text) of the blocks of a file: a line with the name, then the text up to an empty line."""
    text = re.sub("(?m)^#.*\n", "", (STORYBOOK / file).read_text(encoding="utf-8"))
    return [(name, body) for name, body in (block.split("\n", 1) for block in text.strip().split("\n\n"))]


def read_table(text: str) -> list[Row]:
    heading, *lines = (line.split("| ") for line in join_lines(text).split("\n"))
    return [{key: cell.split(", ") for key, cell in zip(heading, line, strict=True)} for line in lines]


def read_plot(path: Path, tables: dict[str, list[Row]], phrases: dict[str, str]) -> Plot:
    """A plot from its file: slots to fill, one a line, then the text."""
    head, body = join_lines(path.read_text(encoding="utf-8")).strip().split("\n\n", 1)
    slots = [read_slot(line, tables) for line in head.split("\n")]
    tag_keys = ["temper", "group", "he", *(key for rows in slots for key in rows[0] if key != "moral")]
    return Plot(path.stem, slots, tag_keys, parse(body, phrases))


def read_slot(line: str, tables: dict[str, list[Row]]) -> list[Row]:
    """The rows that may fill a slot: those of the tables it names (`thing: toys foods`), or its own words."""
    slot, values = line.split(": ")
    if values.split()[0] not in tables:
        return [{slot: values.split(", ")}]
    rows = [row for table in values.split() for row in tables[table]]
    return [{slot if i == 0 else f"{slot}.{key}": row[key] for i, key in enumerate(row)} for row in rows]


def askable_words(row: Row) -> Iterator[tuple[str, set[str]]]:
    """The words of a row that a story can be asked to use, each with the forms in which stories use it."""
    if "skill" in row:
        yield row["skill"][0], {row[key][0] for key in ("skill", "skill.past", "skill.ing")}
        return
    for key, words in row.items():
        for word in words:
            if word.isalpha() and word not in TOO_COMMON:
                if key.endswith(".adj"):
                    yield word, {word}
                elif "." not in key and key not in NOT_ASKED:
                    yield word, {word, plural(word)}


def split_of(name: str, kind: str, trait: str) -> str:
    """The split of all stories about such a hero: of twenty heroes, one is for validation and one for test."""
    rank = storybook().rank
    return {0: "validation", 1: "test"}.get((rank[name] + rank[kind] + rank[trait]) % 20, "train")


class Casting:
    """Draws who and what one story is about.

    Entries of the friend end in 2, pronouns of the elder in 3. `$one` is the hero: by pronoun where that is clear.
    """

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw
        self.book = storybook()
        self.cast = Cast()

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.draw() * len(options))]

    def fill(self, row: Row, suffix: str = "") -> None:
        for key, words in row.items():
            self.cast[key + suffix] = words[0] if len(words) == 1 else self.pick(words)

    def character(self, groups: Sequence[str], suffix: str = "") -> None:
        """Somebody from one of the groups, with a name and pronouns that fit the kind."""
        self.fill(self.pick(self.book.kinds[self.pick(groups)]), suffix)
        kind = self.cast["kind" + suffix]
        pronoun = {"girl": "she", "boy": "he", "robot": "it"}.get(kind) or self.pick(("pet she", "pet he"))
        self.cast["name" + suffix] = self.pick(self.book.names[pronoun])
        self.fill(self.book.pronouns[pronoun.removeprefix("pet ")], suffix)

    def everybody(self, split: str) -> None:
        """A hero who belongs to the split, a friend, and somebody at home."""
        cast = self.cast
        self.character(HERO_GROUPS)
        while True:
            cast["trait"], cast["temper"] = self.pick(self.book.tempers)
            if split_of(cast["name"], cast["kind"], cast["trait"]) == split:
                break
        while cast.get("name2", cast["name"]) == cast["name"]:
            self.character(FRIEND_GROUPS[cast["group"]], "2")
        alike = cast["kind2"] == cast["kind"]
        cast["friend"] = cast["name2"]
        cast["friend.a"] = f"{'another' if alike else 'a'} {cast['kind2']}"
        cast["friend.the"] = cast["friend"] if alike else f"the {cast['kind2']}"
        self.fill(self.pick(self.book.elders["makers" if cast["kind"] == "robot" else "family"]))
        self.fill(self.book.pronouns[cast["pronoun"]], "3")
        cast["one"] = cast["name"] if cast["he"] in (cast["he2"], cast["he3"]) else cast["he"]


def cast_story(seed: int, split: str) -> tuple[Random, Casting]:
    """Who story number `seed` of a split is about: the first, and quick, step of writing it."""
    rng = Random(seed * len(SPLITS) + SPLITS.index(split))
    casting = Casting(rng.random)
    casting.everybody(split)
    return rng, casting


def write_story(seed: int, split: str = "train", *, brief: bool = False) -> Story:
    """Story number `seed` of a split, the same in every process. Raises ValueError where there is no such split."""
    rng, casting = cast_story(seed, split)
    plots = casting.book.brief_plots if brief else casting.book.plots
    plot, keep, cast = casting.pick(plots), casting.pick(KEEP), casting.cast
    for rows in plot.slots:
        casting.fill(casting.pick(rows))
    text = tell(plot.parts, cast, frozenset([cast[key] for key in plot.tag_keys]), rng.random, keep)
    base_form = casting.book.base_form
    askable = sorted({base_form[word] for word in WORD.findall(text) if word in base_form} - {cast["trait"]})
    words = tuple(rng.sample(askable, min(len(askable), casting.pick((1, 2, 3)))))
    return Story(
        text,
        StoryFacts(cast["name"], cast["kind"], cast["trait"], words, cast["mood"], length_of(text), plot.name),
    )


def stories(split: str, start: int = 0, count: int | None = None, *, brief: bool = False) -> Iterator[Story]:
    """Stories of a split from number `start` on, without end where no count is given."""
    seeds = count_from(start) if count is None else range(start, start + count)
    return (write_story(seed, split, brief=brief) for seed in seeds)


def check_facts(text: str, facts: StoryFacts | AskedFacts) -> dict[str, bool]:
    """Which facts a text meets: name, kind, trait, each asked word as `word:lamp`, mood and length. Fit to be a reward.

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
    """The forms in which stories use a word."""
    return storybook().forms.get(word) or {word, plural(word)}


def mood_of(text: str) -> str | None:
    """The mood in which a text ends, None where its last words give no cue."""
    for word in reversed(WORD.findall(text.lower())[-ENDING_WORDS:]):
        if word in MOOD_OF_CUE:
            return MOOD_OF_CUE[word]
    return None


def length_of(text: str) -> str:
    """brief, short, medium or long."""
    words = len(text.split())
    return "brief" if words < SHORT else "short" if words < MEDIUM else "medium" if words < LONG else "long"
