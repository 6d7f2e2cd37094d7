"""gpt export and import: a model in Hugging Face's format."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from cli.console import Console, notice
from cli.options import CheckpointName, RunArgument
from engine.errors import InputError
from engine.folders import one_writer
from engine.progress import listener


def export_run(
    path: RunArgument,
    out: Annotated[Path, Option(help="The folder to write; with --gguf, the file.", show_default=False)],
    which: CheckpointName = "latest",
    gguf: Annotated[bool, Option("--gguf", help="Write one file for llama.cpp, Ollama and LM Studio.")] = False,
    precision: Annotated[str | None, Option(help="Of --gguf: fp32, fp16 (unless given), bf16 or int8.")] = None,
) -> None:
    """Write a model for transformers and other tools that read Hugging Face's files, or for llama.cpp.

    Example: gpt export runs/nano --out nano-hf
    """
    from engine.huggingface import EXPORTED_FILES, export
    from engine.run import Run

    if precision is not None and not gguf:
        raise InputError("--precision belongs to --gguf; Hugging Face's files are written in fp32")
    if gguf:
        from engine.gguf import export as export_gguf

        with _writing(out):
            chats = export_gguf(Run(path), out, which, precision or "fp16", notice)
        print(f"{out}: {out.stat().st_size:,} bytes")
        tool, text = ("llama-cli", "") if chats else ("llama-completion", ' -no-cnv -p "Once upon a time"')
        print(f"use it     {tool} -m {shlex.quote(str(out))}{text}")
        return
    with _empty(out, EXPORTED_FILES, "export"), _writing(out):
        files = export(Run(path), out, which, print)
    for file in files:
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
    from engine.huggingface import import_
    from engine.run import RUN_FILES

    with _empty(out, RUN_FILES, "import"):
        model = import_(folder, out).model
    print(f"{out}: {model.parameters:,} parameters, context {model.context}, vocabulary {model.vocab_size:,}")
    print(f'try it     gpt generate {out} "Once upon a time"')


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Show that something is being written."""
    with Console(stderr=True), listener.get()(f"writing {out}", None, ""):
        yield


@contextlib.contextmanager
def _empty(out: Path, files: re.Pattern[str], command: str) -> Iterator[None]:
    """Be the one writer of a folder that must be new or empty, and was before `command`; after an error it is again."""
    with one_writer(out, files, say=notice) as folder:
        if f"(gpt {command} " in folder.killed:
            folder.clear()
        if folder.before:
            raise InputError(f"{out} is there already and not an empty folder; choose another with --out")
        yield
