"""gpt tokenizer train, gpt tokenizer show"""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Column
from engine.errors import InputError

app = typer.Typer(help="Train a tokenizer, or look into one.", no_args_is_help=True)


@app.command("train")
def train(
    data: Annotated[str, typer.Option(help="What to train it on; the names that `gpt train --data` knows.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("tokenizer.model"),
    vocab_size: Annotated[int, typer.Option(help="Tokens, bytes and special tokens counted in.")] = 4096,
    column: Column = None,
) -> None:
    """Train a tokenizer on text.

    Example: gpt tokenizer train --data 'stories/*.txt' --vocab-size 8000 --out tokenizer.model
    """
    from engine.tokenizer import train_tokenizer
    from train.data.sources import open_source

    source = open_source(data, column=column)
    tokenizer = train_tokenizer(source.documents("train"), vocab_size, notice=print)
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    print(f"{out}: a vocabulary of {tokenizer.vocab_size:,} tokens")


@app.command("show")
def show(
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
