"""gpt data prepare, gpt data show"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Column

app = typer.Typer(help="Prepare text for training, or look at it.", no_args_is_help=True)


@app.command("prepare")
def prepare(
    data: Annotated[str, typer.Argument(help="What to prepare; the names that `gpt train --data` knows.")],
    out: Annotated[Path, typer.Option(help="Folder for the token files; then usable as --data.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer's file, a run, or prepared data that has one; else it is trained.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer, where one is trained.")] = 28_000,
    column: Column = None,
    documents: Annotated[int | None, typer.Option(min=1, help="At most so many documents.")] = None,
    max_tokens: Annotated[
        float | None, typer.Option(min=1, max=1e15, help="At most so many tokens, such as 1e9.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core unless given.")] = None,
) -> None:
    """Tokenize a data set into files that training maps into memory. Interrupted, the same command goes on.

    Example: gpt data prepare tinystories --out data/tinystories
    """
    from cli.console import Console
    from engine.tokenizer import Tokenizer, tokenizer_file, train_tokenizer
    from train.data.shards import prepare
    from train.data.sources import open_source
    from train.pretrain import SAMPLE_BYTES_PER_TOKEN

    console = Console()
    source = open_source(data, column=column, limit=documents)
    console.say(source.describe())
    ready = tokenizer_file(out)
    if tokenizer is not None:
        pieces = Tokenizer.load(tokenizer)
    elif ready.exists():
        pieces = Tokenizer.load(ready)
    else:
        sample_bytes = SAMPLE_BYTES_PER_TOKEN * vocab_size
        pieces = train_tokenizer(source.documents("train"), vocab_size, sample_bytes=sample_bytes, notice=console.say)
        out.mkdir(parents=True, exist_ok=True)
        pieces.save(ready)
    limits = {"train": None if max_tokens is None else int(max_tokens), "validation": None}
    try:
        for split, limit in limits.items():
            progress, begin, fresh = console.preparing(split), time.perf_counter(), not (out / split).exists()
            shards = prepare(source, pieces, out, split, workers=workers, max_tokens=limit, progress=progress)
            speed = f", {shards.bytes / 1e6 / (time.perf_counter() - begin):.1f} MB/s" if fresh else ""
            console.say(
                f"{split}: {shards.documents:,} documents, {shards.tokens:,} tokens, {shards.bytes:,} bytes of text"
                + speed
            )
            if source.rows and fresh:
                console.say(f"{split}: {source.describe_read(shards.documents)}")
    finally:
        console.close()
    if source.held_out_by:
        console.say(f"held out   {source.held_out_by}")
    console.say(f"use it     gpt train tiny --data {out}")


@app.command("show")
def show(
    data: Annotated[str, typer.Argument(help="A prepared folder, or any name that `gpt train --data` knows.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many documents to print.")] = 1,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    column: Column = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte of prepared files against its checksum.")
    ] = False,
) -> None:
    """Show what a data set holds.

    Example: gpt data show stories -n 3
    """
    from itertools import islice

    from engine.tokenizer import Tokenizer
    from train.data.shards import TokenShards, is_prepared
    from train.data.sources import open_source

    if is_prepared(data):
        tokenizer = Tokenizer.load(data)
        shards = TokenShards.open(data, split, tokenizer.fingerprint)
        if verify:
            shards.verify()
        print(
            f"{data}, {split}: {shards.documents:,} documents, {shards.tokens:,} tokens, {shards.bytes:,} bytes of text"
            + (", every checksum right" if verify else "")
        )
        texts: Iterator[str] = (
            tokenizer.decode(shards.document(number).tolist()) for number in range(shards.documents)
        )
    else:
        source = open_source(data, column=column)
        print(source.describe())
        texts = source.documents(split)
    for text in islice(texts, count):
        print(f"---\n{text}")
