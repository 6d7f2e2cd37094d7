"""What a run is measured on: held-out documents or conversations, and what there is to complete in them."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from engine.chat_template import Message
from engine.config import DataConfig
from engine.errors import InputError
from engine.tokenizer import Tokenizer
from train.data.encoded import Conversations, Documents
from train.data.loader import TokenSource
from train.data.shards import TokenShards, is_prepared
from train.data.sources import StoryRequests, open_conversations, open_source
from train.data.stories import AskedFacts
from train.measures import UNSPACED

Document = str | list[Message]
# Where the second half of a text may begin: at the white space before a word, or inside a script that has none.
WORD_BEGINS = re.compile(rf"(?<=\S)\s+(?=\S)|(?<=[{UNSPACED}])(?=[{UNSPACED}])")


@dataclass(frozen=True)
class Case:
    """What to go on from, a text or a conversation, and what came next.

    `facts` are what the whole, a story, has to meet; None where it need not be a story.
    """

    prompt: Document
    reference: str
    facts: AskedFacts | None = None


@dataclass(frozen=True)
class HeldOut:
    """Documents of one kind, and beside them the facts asked of each: None where they are not the program's stories."""

    name: str
    documents: Iterator[Document]
    facts: Iterator[AskedFacts | None]


def open_held_out(data: DataConfig, split: str, prepared: Path | None) -> HeldOut:
    """The documents of a split, as text: of prepared data (the source, or else in `prepared`), or of the source.

    Raises InputError where `data` names nothing or has no such split.
    """
    documents: Iterator[Document]
    facts: Iterator[AskedFacts | None] = repeat(None)
    folders = (folder for folder in (Path(data.source), prepared) if folder and is_prepared(folder, split))
    if folder := next(folders, None):
        tokenizer = Tokenizer.load(folder)
        shards = TokenShards.open(folder, split, tokenizer.fingerprint)
        documents = (tokenizer.decode(shards.document(number).tolist()) for number in range(shards.documents))
        name = shards.index["source"]
    else:
        source = open_conversations(data) or open_source(
            data.source, column=data.column, holdout=data.holdout, limit=data.documents
        )
        documents, name = source.documents(split), source.name
        if isinstance(source, StoryRequests):
            facts = (request.facts for request in source.requests(split))
    if name == "stories":
        # Nobody asked for anything but that it be a story.
        facts = repeat(AskedFacts())
    return HeldOut(f"{Path(name).name}, {split}", documents, facts)


def make_case(document: Document, facts: AskedFacts | None, tokenizer: Tokenizer, context: int) -> Case | None:
    """The second half of a text after its first, or the first answer of a conversation; None where there is neither.

    A text is cut to the context, and halved before the first word that begins past its middle.
    """
    if not isinstance(document, str):
        first = next((n for n, message in enumerate(document) if message.role == "assistant" and message.learn), 0)
        return Case(document[:first], document[first].content, facts) if first else None
    # Room for the end, and for halves that take a token more than the whole. Of a character cut in two nothing is left.
    text = tokenizer.bytes_of(tokenizer.encode(document)[: context - 4]).decode(errors="ignore")
    cut = WORD_BEGINS.search(text, len(text) // 2)
    return Case(text[: cut.start()], text[cut.start() :], facts) if cut else None


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer, context: int, tokens: int | None = None
) -> tuple[list[Document], TokenSource]:
    """The first documents that hold `tokens` tokens, or all there are, and the same as token ids."""
    taken, texts, conversations = [], Documents(tokenizer, context), Conversations(tokenizer, context)
    for number, document in enumerate(documents):
        taken.append(document)
        if isinstance(document, str):
            texts.add(document)
        else:
            conversations.add(document, f"conversation {number}")
        if tokens is not None and texts.tokens + conversations.tokens >= tokens:
            break
    if not texts.tokens + conversations.tokens:
        raise InputError(f"none of the conversations fits into the context of {context} tokens; choose other --data")
    return taken, texts if texts.tokens else conversations
