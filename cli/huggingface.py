"""gpt export and import: a model in Hugging Face's format."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from cli.options import CheckpointName, RunArgument
from engine.errors import InputError


def export_run(
    path: RunArgument,
    out: Annotated[Path, Option(help="The folder to write.", show_default=False)],
    which: CheckpointName = "latest",
) -> None:
    """Write a model for transformers and other tools that read Hugging Face's files.

    Example: gpt export runs/nano --out nano-hf
    """
    _require_room(out)
    from engine.huggingface import export
    from engine.run import Run

    for file in export(Run(path), out, which, print):
        print(f"{file}: {file.stat().st_size:,} bytes")
    print(f"use it     transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
    print(f"           transformers.AutoTokenizer.from_pretrained({str(out)!r})")


def import_folder(
    folder: Annotated[Path, Argument(help="Folder of a GPT-NeoX or Pythia model.", show_default=False)],
    out: Annotated[Path, Option(help="Folder of the run to make, such as runs/pythia.", show_default=False)],
) -> None:
    """Make a run of a pretrained model, which other commands then take like one trained here.

    Example: gpt import pythia-160m --out runs/pythia
    """
    _require_room(out)
    from engine.huggingface import import_

    model = import_(folder, out).model
    print(f"{out}: {model.parameters:,} parameters, context {model.context}, vocabulary {model.vocab_size:,}")
    print(f'try it     gpt generate {out} "Once upon a time"')


def _require_room(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there already and not an empty folder; choose another with --out")
