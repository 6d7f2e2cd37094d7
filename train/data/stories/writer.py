"""The writer of stories. Each has facts that a program can check, and all of it follows from its number and split.

The folder storybook holds the words, the phrases and the plots; grammar.py is the language they are written in. Brief
stories, of three sentences, have plots of their own, and the heroes of the long stories of the same numbers. The first
name, kind and trait in a story are its hero's, and they decide its split: no text can come out of two splits, while the
held-out stories are made of the same words.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

from train.data.stories.grammar import Cast, Parts, join_lines, parse, plural, tell

STORYBOOK = Path(__file__).with_name("storybook")
SPLITS = ("train", "validation", "test")

SHORT, MEDIUM, LONG = 46, 100, 170  # the fewest words of such a story; a brief one has fewer
KEEP = (0.0, 0.0, 0.0, 0.3, 0.5, 0.7, 1.0, 1.0, 1.0)  # shares of the optional texts to keep; each story draws one
NOT_ASKED = {"mood", "moral", "how", "trouble"}  # slots whose words the story need not contain
TOO_COMMON = {"little", "old", "new"}
WORD = re.compile("[A-Za-z]+")

T = TypeVar("T")
Row = dict[str, list[str]]  # cast key: the words it may take


@dataclass(frozen=True)
class AskedFacts:
    """What can be asked of a story. None, or no words, leaves it open. `words` are content words in base form.

    `unlike` are facts of which the story must meet none, where another ending or another hero is asked for.
    """

    name: str | None = None
    kind: str | None = None
    trait: str | None = None
    words: tuple[str, ...] = ()
    mood: str | None = None
    length: str | None = None
    unlike: "AskedFacts | None" = None


@dataclass(frozen=True)
class Story:
    """A story with all of its facts, and the plot, which is not checked."""

    text: str
    facts: AskedFacts
    plot: str


class Plot(NamedTuple):
    """A plot: what may fill each of its slots, which of the cast its text tests with @, and the text."""

    name: str
    slots: list[list[Row]]
    tag_keys: list[str]
    parts: Parts


class Storybook:
    """All that the storyteller knows: the plots, and the tables of words, sorted by what they are looked up by."""

    def __init__(self) -> None:
        self.tables = {name: read_table(text) for name, text in read_blocks("words.txt")}
        self.phrases, requests = (
            {name: join_lines(text).strip() for name, text in read_blocks(file)}
            for file in ("phrases.txt", "requests.txt")
        )
        self.request, self.change = parse("<request>", requests), parse("<change>", requests)
        self.plots, self.brief_plots = (
            [self.read_plot(path) for path in sorted((STORYBOOK / folder).glob("*.txt"))]
            for folder in ("plots", "brief")
        )
        self.friends = {row["group"][0]: row["friend"] for row in self.tables["friends"]}
        self.kinds = {group: [row for row in self.tables["kinds"] if row["group"] == [group]] for group in self.friends}
        self.moods = {cue: row["mood"][0] for row in self.tables["moods"] for cue in row["cue"]}
        self.tempers = [(trait, row["temper"][0]) for row in self.tables["traits"] for trait in row["trait"]]
        names = {row["pronoun"][0]: row["name"] for row in self.tables["names"]}
        self.names = names | {f"pet {he}": names[he] + names[f"pet {he}"] for he in ("she", "he")}
        # Every name, kind and trait; their places in these lists decide the split of a story.
        self.heroes = {
            "name": sorted({name for some in names.values() for name in some}),
            "kind": sorted({kind for row in self.tables["kinds"] for kind in row["kind"]}),
            "trait": [trait for trait, _ in self.tempers],
        }
        self.choices = self.heroes | {"mood": sorted(set(self.moods.values()))}
        self.classes = dict.fromkeys(self.heroes["kind"], "Kind") | dict.fromkeys(self.heroes["name"], "Name")
        self.rank = {word: rank for words in self.heroes.values() for rank, word in enumerate(words)}
        slots = [row for plot in self.plots for rows in plot.slots for row in rows]
        # The forms of each word that a story can be asked to use.
        self.forms = dict(pair for row in slots for pair in askable_words(row))
        self.base_form = {form: word for word in self.forms for form in self.forms[word]}

    def read_plot(self, path: Path) -> Plot:
        """Read a plot from its file: slots to fill, one a line, then the text."""
        head, body = join_lines(path.read_text(encoding="utf-8")).strip().split("\n\n", 1)
        slots = [self.read_slot(*line.split(": ")) for line in head.split("\n")]
        tag_keys = ["temper", "group", "he", *(key for rows in slots for key in rows[0] if key != "moral")]
        return Plot(path.stem, slots, tag_keys, parse(body, self.phrases))

    def read_slot(self, slot: str, values: str) -> list[Row]:
        """Return what may fill a slot: the rows of the tables it names (`thing: toys foods`), or its own words."""
        if values.split()[0] not in self.tables:
            return [{slot: values.split(", ")}]
        rows = [row for table in values.split() for row in self.tables[table]]
        return [{f"{slot}.{key}" if i else slot: row[key] for i, key in enumerate(row)} for row in rows]


@cache
def storybook() -> Storybook:
    """Return the storybook, which is read once."""
    return Storybook()


def read_blocks(file: str) -> Iterator[list[str]]:
    """Read the name and the text of each block of a file: a line with the name, then the text up to an empty line."""
    text = re.sub("(?m)^#.*\n", "", (STORYBOOK / file).read_text(encoding="utf-8"))
    return (block.split("\n", 1) for block in text.strip().split("\n\n"))


def read_table(text: str) -> list[Row]:
    heading, *lines = (line.split("| ") for line in join_lines(text).split("\n"))
    return [{key: cell.split(", ") for key, cell in zip(heading, line, strict=True)} for line in lines]


def askable_words(row: Row) -> Iterator[tuple[str, set[str]]]:
    """Yield the words of a row that a story can be asked to use, each with the forms in which stories use it."""
    if "skill" in row:
        yield row["skill"][0], {row[key][0] for key in ("skill", "skill.past", "skill.ing")}
        return
    for key, words in row.items():
        adjective = key.endswith(".adj")
        if adjective or ("." not in key and key not in NOT_ASKED):
            for word in words:
                if word.isalpha() and word not in TOO_COMMON:
                    yield word, {word} if adjective else {word, plural(word)}


def split_of(name: str, kind: str, trait: str) -> str:
    """Return the split of all stories about such a hero: of twenty heroes, one is for validation and one for test."""
    rank = storybook().rank
    return {0: "validation", 1: "test"}.get((rank[name] + rank[kind] + rank[trait]) % 20, "train")


class Casting:
    """The cast of story number `seed` of a split: a hero who belongs to the split, a friend, and somebody at home.

    Entries of the friend end in 2, pronouns of the elder in 3. `$one` is the hero: by pronoun where that is clear.
    Raises ValueError where there is no such split.
    """

    def __init__(self, seed: int, split: str) -> None:
        self.rng = Random(seed * len(SPLITS) + SPLITS.index(split))
        self.book = storybook()
        self.cast = cast = Cast()
        self.character(self.book.tables["heroes"][0]["group"])
        while True:
            cast["trait"], cast["temper"] = self.pick(self.book.tempers)
            if split_of(cast["name"], cast["kind"], cast["trait"]) == split:
                break
        while cast.get("name2", cast["name"]) == cast["name"]:
            self.character(self.book.friends[cast["group"]], "2")
        alike = cast["kind2"] == cast["kind"]
        cast["friend"] = cast["name2"]
        cast["friend.a"] = f"{'another' if alike else 'a'} {cast['kind2']}"
        cast["friend.the"] = cast["friend"] if alike else f"the {cast['kind2']}"
        self.fill(self.pick(self.book.tables["makers" if cast["kind"] == "robot" else "family"]))
        self.fill(self.pronouns(cast["pronoun"]), "3")
        cast["one"] = cast["name"] if cast["he"] in (cast["he2"], cast["he3"]) else cast["he"]

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]

    def fill(self, row: Row, suffix: str = "") -> None:
        for key, words in row.items():
            self.cast[key + suffix] = words[0] if len(words) == 1 else self.pick(words)

    def character(self, groups: Sequence[str], suffix: str = "") -> None:
        """Cast somebody from one of the groups, with a name and pronouns that fit the kind."""
        self.fill(self.pick(self.book.kinds[self.pick(groups)]), suffix)
        kind = self.cast["kind" + suffix]
        pronoun = {"girl": "she", "boy": "he", "robot": "it"}.get(kind) or self.pick(("pet she", "pet he"))
        self.cast["name" + suffix] = self.pick(self.book.names[pronoun])
        self.fill(self.pronouns(pronoun.removeprefix("pet ")), suffix)

    def pronouns(self, he: str) -> Row:
        return next(row for row in self.book.tables["pronouns"] if row["he"] == [he])


def write_story(
    seed: int, split: str = "train", *, brief: bool = False, instead: Mapping[str, str] | None = None
) -> Story:
    """Write story number `seed` of a split, the same in every process; `instead` changes entries of its cast.

    Raises ValueError for another split.
    """
    casting = Casting(seed, split)
    book, cast, rng = casting.book, casting.cast, casting.rng
    plot, keep = casting.pick(book.brief_plots if brief else book.plots), casting.pick(KEEP)
    for rows in plot.slots:
        casting.fill(casting.pick(rows))
    cast.update(instead or {})
    text = tell(plot.parts, cast, frozenset([cast[key] for key in plot.tag_keys]), rng.random, keep)
    askable = sorted({book.base_form[word] for word in WORD.findall(text) if word in book.base_form} - {cast["trait"]})
    words = tuple(rng.sample(askable, min(len(askable), casting.pick((1, 2, 3)))))
    facts = AskedFacts(cast["name"], cast["kind"], cast["trait"], words, cast["mood"], length_of(text))
    return Story(text, facts, plot.name)


def stories(split: str, start: int = 0, number: int | None = None, *, brief: bool = False) -> Iterator[Story]:
    """Write stories of a split from number `start` on, without end unless it is said how many."""
    seeds = count(start) if number is None else range(start, start + number)
    return (write_story(seed, split, brief=brief) for seed in seeds)


def length_of(text: str) -> str:
    """Return brief, short, medium or long."""
    words = len(text.split())
    return "brief" if words < SHORT else "short" if words < MEDIUM else "medium" if words < LONG else "long"
