"""gpt data prepare and show, gpt tokenizer train and show"""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import Console, notice
from cli.options import Column, Few, grouped
from cli.training import is_of_use
from engine.config import Count
from engine.errors import InputError
from engine.folders import one_writer, require_free

if TYPE_CHECKING:
    from train.data.shards import TokenShards

data_app = typer.Typer(help="Prepare text for training, or look at it.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train a tokenizer, or look into one.", no_args_is_help=True)


@data_app.command("prepare", short_help="Tokenize text into files to train on")
@grouped
def prepare_data(
    data: Annotated[str, typer.Argument(help="What to prepare; the names that `gpt train --data` knows.")],
    out: Annotated[Path, typer.Option(help="Folder for the token files; then usable as --data.")],
    tokenizer: Annotated[Path | None, typer.Option(help="A file, a run or prepared data; else one is trained.")] = None,
    vocab_size: Annotated[
        int, "model.vocab_size", typer.Option(help="Tokens of a tokenizer that is trained.")
    ] = 28_000,
    column: Column = None,
    documents: Annotated[Count | None, typer.Option(help="At most this many documents.")] = None,
    max_tokens: Annotated[float | None, "budget.tokens", typer.Option(help="At most this many, such as 1e9.")] = None,
    workers: Annotated[Few | None, typer.Option(help="Processes; one per core unless given.")] = None,
) -> None:
    """Tokenize a data set into files that training maps into memory. Interrupted, the same command goes on.

    Example: gpt data prepare tinystories --out data/tinystories
    """
    from engine.config import DataConfig
    from engine.run import PREPARED_FILES
    from engine.tokenizer import Tokenizer, tokenizer_file, train_tokenizer
    from train.data.shards import prepare, read_indices
    from train.data.sources import open_source, pinned
    from train.pretrain import SAMPLE_BYTES_PER_TOKEN

    console = Console()
    goes_on = any(out.glob("*/*.json"))

    def keep(error: BaseException) -> bool:
        return goes_on or is_of_use(out, error)

    with console, one_writer(out, PREPARED_FILES, keep=keep, say=notice) as folder:
        if stranger := next((path for path in folder.entries() if not folder.knows(path)), None):
            raise InputError(
                f"{out} holds {stranger.relative_to(folder.folder)}, which is no prepared data; choose another --out"
            )
        begun = [index["commit"] for index in read_indices(out) if index["source"] == data]
        commit = begun[0] if begun else pinned(DataConfig(source=data)).revision
        source = open_source(data, column=column, limit=documents, commit=commit)
        source.say = console.say
        console.say(source.describe())
        ready = tokenizer_file(out)
        if tokenizer is not None:
            chosen = Tokenizer.load(tokenizer)
        elif ready.exists():
            chosen = Tokenizer.load(ready)
        else:
            sample_bytes = SAMPLE_BYTES_PER_TOKEN * vocab_size
            chosen = train_tokenizer(
                source.documents("train"), vocab_size, sample_bytes=sample_bytes, notice=console.say
            )
            chosen.save(ready)
        limits = {"train": None if max_tokens is None else int(max_tokens), "validation": None}
        for split, limit in limits.items():
            begin, fresh = time.perf_counter(), not (out / split).exists()
            shards = prepare(source, chosen, out, split, workers=workers, max_tokens=limit)
            speed = f", {shards.bytes / 1e6 / (time.perf_counter() - begin):.1f} MB/s" if fresh else ""
            console.say(f"{split}: {describe(shards)}{speed}")
            if source.rows and fresh:
                console.say(f"{split}: {source.describe_read(shards.documents)}")
    if source.held_out_by:
        console.say(f"held out   {source.held_out_by}")
    console.say(f"use it     gpt train tiny --data {out}")


def describe(shards: "TokenShards") -> str:
    return f"{shards.documents:,} documents, {shards.tokens:,} tokens, {shards.bytes:,} bytes of text"


@data_app.command("show")
@grouped
def show_data(
    data: Annotated[str, typer.Argument(help="A prepared folder, or any name that `gpt train --data` knows.")],
    count: Annotated[Few, typer.Option("--count", "-n", help="How many documents to print.")] = 1,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    column: Column = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte of prepared files.")] = False,
) -> None:
    """Show what a data set holds.

    Example: gpt data show stories -n 3
    """
    from engine.tokenizer import Tokenizer
    from train.data.shards import TokenShards, is_prepared
    from train.data.sources import open_source

    if is_prepared(data):
        tokenizer = Tokenizer.load(data)
        shards = TokenShards(data, split, tokenizer.fingerprint)
        if verify:
            shards.verify()
        print(f"{data}, {split}: {describe(shards)}{', every checksum right' if verify else ''}")
        texts: Iterator[str] = (tokenizer.decode(shards.document(each).tolist()) for each in range(shards.documents))
    elif verify:
        raise InputError(f"--verify checks prepared data, and {data} is not: gpt data prepare --help")
    else:
        source = open_source(data, column=column)
        print(source.describe())
        texts = source.documents(split)
    for text in islice(texts, count):
        print(f"---\n{text}")


@tokenizer_app.command("train")
@grouped
def train_new_tokenizer(
    data: Annotated[str, typer.Option(help="What to train it on; the names that `gpt train --data` knows.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("tokenizer.model"),
    vocab_size: Annotated[
        int, "model.vocab_size", typer.Option(help="Tokens, bytes and special tokens counted in.")
    ] = 4096,
    column: Column = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the tokenizer that is there.")] = False,
) -> None:
    """Train a tokenizer on text.

    Example: gpt tokenizer train --data 'stories/*.txt' --vocab-size 8000 --out tokenizer.model
    """
    from engine.tokenizer import Tokenizer, train_tokenizer
    from train.data.sources import open_source

    require_free(out, overwrite, Tokenizer.load)
    source = open_source(data, column=column)
    with Console() as console:
        tokenizer = train_tokenizer(source.documents("train"), vocab_size, notice=console.say)
    tokenizer.save(out)
    print(f"{out}: a vocabulary of {tokenizer.vocab_size:,} tokens")


@tokenizer_app.command("show", short_help="Show a tokenizer, or how it cuts a text")
@grouped
def show_tokenizer(
    path: Annotated[Path, typer.Argument(help="A tokenizer's file, or the folder of a run or of prepared data.")],
    text: Annotated[str, typer.Argument(help="Show how this text is cut.")] = "",
) -> None:
    """Show a tokenizer's size and special tokens, or how it cuts a text.

    Example: gpt tokenizer show runs/nano "Once upon a time"
    """
    from engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    if not text:
        print(f"a vocabulary of {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:16]}")
        for name, index in tokenizer.special.items():
            print(f"{index:>6}  {name}")
        return
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise InputError("this tokenizer does not give the text back as it was")
    for index in ids:
        print(f"{index:>6}  {tokenizer.token_bytes[index].decode('utf-8', errors='backslashreplace')!r}")
    print(f"{len(ids)} tokens, {len(text.encode()) / max(len(ids), 1):.2f} bytes per token")
