"""A small language for stories that come out different each time.

    {a|b|c}               one of them, drawn at random; an alternative may be empty or hold more braces
    {@bold a|@she,it b|c} `a` if "bold" is among the tags of the story, `b` if "she" or "it" is, and only otherwise `c`
    $name  $Name          an entry of the cast, as it is or with a capital; `$things` is the plural of `$thing`
    <day>                 a phrase: one of the alternatives a|b|c that stand under this name
    {+ text}              a text that may go missing, as it will in a short story; so may a line that starts with +

An indented line continues the one above it, and an empty line parts two paragraphs. Authors need not care about double
spaces, a space before a full stop or comma, or "a" that should be "an".
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

TOKEN = re.compile(r"{\+|[{|}]|@[\w,]+ ?|\$\w+(?:\.[a-z]+)?|<\w+>|[^{|}@$<]+")
A_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])(?!uni|use|one\b)")

Parts = list["str | Slot | Choice | Extra"]


class Slot(NamedTuple):
    key: str  # of a cast entry


class Choice(NamedTuple):
    tagged: list[tuple[frozenset[str], Parts]]
    plain: list[Parts]


class Extra(NamedTuple):
    parts: Parts


class Cast(dict[str, str]):
    """Who and what a story is about. Capitalised and plural entries come into being when first asked for."""

    def __missing__(self, key: str) -> str:
        if key[0].isupper():
            value = self[key[0].lower() + key[1:]]
            self[key] = value[0].upper() + value[1:]
        elif key.endswith("s"):
            self[key] = plural(self[key[:-1]])
        else:
            raise KeyError(key)
        return self[key]


def plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh", "o")) else "s")


def join_lines(text: str) -> str:
    """Append each indented line to the one above; beside a brace or a bar, a line break is no space."""
    return re.sub(r"\n +", " ", re.sub(r"(?<=[{|])\n +|\s+(?=[|}])", "", text))


def parse(text: str, phrases: Mapping[str, str]) -> Parts:
    """Parse a text, with the phrases it names written out in place. Raises ValueError where braces do not match."""

    def sequence(tokens: Iterator[str]) -> tuple[Parts, str]:
        """Return the parts up to the end of an alternative, and the token that ended it."""
        parts: Parts = []
        for token in tokens:
            if token in "|}":
                return parts, token
            if token == "{":
                parts.append(choice(tokens))
            elif token == "{+":
                parts.append(Extra(sequence(tokens)[0]))
            elif token[0] == "$":
                parts.append(Slot(token[1:]))
            elif token[0] == "<":
                parts.append(choice(iter(TOKEN.findall(phrases[token[1:-1]] + "}"))))
            else:
                parts.append(token)
        return parts, ""

    def choice(tokens: Iterator[str]) -> Choice:
        found, end = Choice([], []), "|"
        while end == "|":
            parts, end = sequence(tokens)
            if parts and isinstance(parts[0], str) and parts[0].startswith("@"):
                found.tagged.append((frozenset(parts[0][1:].strip().split(",")), parts[1:]))
            else:
                found.plain.append(parts)
        if end != "}":
            raise ValueError(f"a brace is not closed after: {found}")
        return found

    whole: Parts = []
    for line in text.split("\n"):
        parts, end = sequence(iter(TOKEN.findall(f"{{{line}}}" if line.startswith("+ ") else line)))
        if end:
            raise ValueError(f"unexpected {end!r} in: {line}")
        whole += [*parts, " " if line else "\n"]
    return whole


def tell(parts: Parts, cast: Cast, tags: frozenset[str], draw: Callable[[], float], keep: float) -> str:
    """Write out one telling. `draw` gives numbers in [0, 1), `keep` is the share of texts in {+ } to keep."""
    told: list[str] = []

    def expand(parts: Parts) -> None:
        for part in parts:
            if isinstance(part, str):
                told.append(part)
            elif isinstance(part, Slot):
                told.append(cast[part.key])
            elif isinstance(part, Choice):
                options = [option for needs, option in part.tagged if not tags.isdisjoint(needs)] or part.plain
                if options:
                    expand(options[int(draw() * len(options))])
            elif draw() < keep:
                expand(part.parts)

    expand(parts)
    paragraphs = "".join(told).split("\n")
    text = "\n\n".join([" ".join(words) for words in map(str.split, paragraphs) if words])
    return A_BEFORE_VOWEL.sub(r"\1n ", text.replace(" .", ".").replace(" ,", ","))
