"""gpt export and import: a model in Hugging Face's format."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from cli.console import Console, notice
from cli.options import CheckpointName, Few, RunArgument
from engine.disk import in_words
from engine.errors import InputError
from engine.folders import one_writer
from engine.progress import listener

# Of a text's keys and values: many of these fill a laptop's memory.
MUCH = 250_000_000


def export_run(
    path: RunArgument,
    out: Annotated[Path, Option(help="The folder to write; with --gguf, the file.", show_default=False)],
    which: CheckpointName = "latest",
    gguf: Annotated[bool, Option("--gguf", help="Write one file for llama.cpp, Ollama and LM Studio.")] = False,
    precision: Annotated[str | None, Option(help="Of --gguf: fp32, fp16 (unless given), bf16 or int8.")] = None,
    license: Annotated[
        str | None, Option(help="For its README: mit, apache-2.0 or another of the Hub's names.")
    ] = None,
    base_model: Annotated[
        str | None, Option(help="For its README: the Hub's name of what it was finetuned from.")
    ] = None,
) -> None:
    """Write a model for transformers and other tools that read Hugging Face's files, or for llama.cpp.

    Example: gpt export runs/nano --out nano-hf
    """
    from cli.model_card import UNKNOWN, model_card
    from engine.huggingface import EXPORTED_FILES, export
    from engine.run import Run

    run = Run(path)
    if precision is not None and not gguf:
        raise InputError("--precision belongs to --gguf; Hugging Face's files are written in fp32")
    if gguf and (license or base_model):
        raise InputError("--license and --base-model belong to the README of Hugging Face's format, without --gguf")
    if gguf:
        from engine.gguf import export as export_gguf

        with _writing(out):
            chats = export_gguf(run, out, which, precision or "fp16", notice)
        print(f"{out}: {out.stat().st_size:,} bytes")
        tool, text = ("llama-cli", "") if chats else ("llama-completion", ' -no-cnv -p "Once upon a time"')
        print(f"use it     {tool} -m {shlex.quote(str(out))}{text}")
        return
    card = model_card(run, out, which, license=license or UNKNOWN, base_model=base_model or "")
    with _empty(out, EXPORTED_FILES, "export"), _writing(out):
        files = export(run, out, which, print, card)
    for file in files:
        print(f"{file}: {file.stat().st_size:,} bytes")
    print(f"use it     transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
    print(f"           transformers.AutoTokenizer.from_pretrained({str(out)!r})")


def import_model(
    model: Annotated[str, Argument(help="A folder, or OWNER/MODEL of the Hugging Face hub.", show_default=False)],
    out: Annotated[Path, Option(help="Folder of the run to make, such as runs/pythia.", show_default=False)],
    revision: Annotated[str | None, Option(help="Of the Hub: a commit, branch or tag; main unless given.")] = None,
    context: Annotated[Few | None, Option(help="Tokens to see, at most the model's own; exports say so too.")] = None,
) -> None:
    """Make a run of a pretrained model, which other commands then take like one trained here.

    Example: gpt import HuggingFaceTB/SmolLM2-135M-Instruct --out runs/smollm2

    Example: gpt import ./pythia-160m --out runs/pythia
    """
    from engine.hub import HUB_NAME, fetch_model
    from engine.huggingface import import_
    from engine.run import RUN_FILES

    folder, hub = Path(model), {}
    with _empty(out, RUN_FILES, "import"):
        if re.fullmatch(HUB_NAME, model) and not folder.exists():
            with Console(stderr=True):
                folder = fetch_model(model, revision, notice)
            hub = {"name": model, "revision": folder.name}
        elif revision is not None:
            raise InputError(f"--revision is for models of the Hub, which {model} is not; leave it out")
        elif not folder.exists():
            raise InputError(f"there is no folder {model}; a model of the Hub is named as OWNER/MODEL")
        recipe = import_(folder, out, context=context, notice=notice, **hub)
    found = recipe.model
    if (cache := 4 * found.cached * found.context) > MUCH:
        notice(
            f"a text of all {found.context:,} tokens takes {in_words(cache)} for its keys and values in fp32, and a "
            "sequence of finetuning is as long; --context sees less"
        )
    print(f"{out}: {found.parameters:,} parameters, context {found.context:,}, vocabulary {found.vocab_size:,}")
    print(f"try it     gpt chat {out}" if recipe.chat else f'try it     gpt generate {out} "Once upon a time"')


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
