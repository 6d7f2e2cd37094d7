"""The `gpt` command: it names every command, and makes a sentence and exit code 2 of an InputError."""

import io
import locale
import os
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cli import (
    DISTRIBUTION,
    bench,
    bench_kernels,
    chat,
    data,
    demo,
    evaluate,
    generate,
    huggingface,
    info,
    installed,
    plan,
    rlhf_answers,
    serve,
    train,
    watch,
)
from cli.launch import rank_here
from cli.options import grouped
from engine.errors import GRACE, InputError

# The commands by their panel in `gpt --help`: name, function, and a phrase that says what it does.
COMMANDS: dict[str, dict[str, tuple[Callable[..., None], str]]] = {
    "Train": {
        "train": (train.train, "Train a model from text"),
        "finetune": (train.finetune, "Go on with other text, or with conversations"),
        "reward": (train.reward, "Learn what people like from pairs of answers"),
        "demo": (demo.demo, "From stories to aligned chat models, in minutes"),
        "plan": (plan.plan, "What a run would take, and what it should reach"),
    },
    "Use": {
        "generate": (generate.generate, "Let a model go on from a prompt"),
        "chat": (chat.chat, "Talk to a model"),
        "serve": (serve.serve, "Serve the OpenAI API and a page"),
    },
    "Share": {
        "export": (huggingface.export_run, "Write a model for transformers or llama.cpp"),
        "import": (huggingface.import_model, "Take a pretrained model, from the Hub or a folder"),
    },
    "Look": {
        "runs": (info.runs, "All runs, how far they are and how good"),
        "watch": (watch.watch, "All runs in the browser, while they train"),
        "info": (info.info, "What a run is, and how far it has come"),
        "doctor": (info.doctor, "What this machine has, and what that means"),
        "settings": (info.settings, "Every setting, its default and its meaning"),
    },
    "Measure": {
        "evaluate": (evaluate.evaluate, "Measure a run on text it has not seen"),
        "bench-train": (bench.bench_train, "Time training against a plain PyTorch GPT"),
        "bench-quality": (bench.bench_quality, "What a plain trainer reaches in the same time"),
        "bench-attention": (bench_kernels.bench_attention, "Time attention against its peers"),
        "bench-layernorm": (bench_kernels.bench_layernorm, "Time LayerNorm against PyTorch's"),
        "bench-cross-entropy": (bench_kernels.bench_cross_entropy, "Time the fused last layer and loss"),
        "bench-decode": (bench.bench_decode, "Time generation against transformers and llama.cpp"),
        "bench-decode-attention": (bench_kernels.bench_decode_attention, "Time attention to a cache"),
        "bench-serving": (bench.bench_serving, "Let many clients stream from gpt serve"),
        "bench-compile": (bench.bench_compile, "Compile every kernel, GPU or not"),
    },
}

TRACEBACK = "GPT_TRACEBACK"  # where this variable is set, a bug shows its traceback

app = typer.Typer(
    name="gpt",
    help="A GPT from raw text to a chat model, with its own kernels. Start with: gpt train nano",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for panel, commands in COMMANDS.items():
    for name, (function, phrase) in commands.items():
        app.command(name, short_help=phrase, rich_help_panel=panel)(grouped(function))
rlhf = typer.Typer(
    help="Align a chat model: from rewards (ppo, grpo), from preferences (dpo), or by choosing (best-of-n).",
    no_args_is_help=True,
)
for function, phrase in (
    (train.ppo, "Align with a reward and a critic"),
    (train.grpo, "Align with a reward, answers compared in groups"),
    (train.dpo, "Align with preferences, without a reward model"),
    (rlhf_answers.best_of_n, "What choosing the best of n answers is worth"),
    (rlhf_answers.pairs, "Draw pairs of answers, and say which is better"),
):
    rlhf.command(function.__name__.replace("_", "-"), short_help=phrase)(grouped(function))
app.add_typer(rlhf, name="rlhf", short_help="Align a chat model: PPO, GRPO, DPO, best of n", rich_help_panel="Train")
app.add_typer(data.data_app, name="data", short_help="Prepare text for training, or show it", rich_help_panel="Look")
app.add_typer(data.tokenizer_app, name="tokenizer", short_help="Train a tokenizer, or show one", rich_help_panel="Look")


def show_versions(wanted: bool) -> None:
    if wanted:
        print(", ".join(f"{each} {installed(each) or 'not installed'}" for each in (DISTRIBUTION, "torch", "triton")))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_versions, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None: ...


def protect_children() -> None:
    """Keep child processes from importing files of the working directory, such as a train.py of the user.

    They find this project as this process does: if it is not installed, through PYTHONPATH.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    root = str(Path(__file__).resolve().parents[1])
    # The first entry is the working directory or the folder of the script, unless safe_path left it out already.
    kept = sys.path if sys.flags.safe_path else sys.path[1:]
    if root not in kept:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))


def speak_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale is another: files and arguments are UTF-8 everywhere."""
    if not sys.flags.utf8_mode and locale.getencoding().lower() not in ("utf-8", "utf8"):
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def open_streams() -> None:
    """Make standard input, output and error such that every text can be written to them, and none is another file.

    Where one was closed (`>&-`), the next file to be opened would take its number, and what is printed from then on.
    """
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(free, True)
    os.close(free)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if name == "stdin" else "w"))  # noqa: SIM115 - open to the end
        elif name != "stdin" and isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            # A terminal may know ASCII alone, and a file's name may be no text.
            stream.reconfigure(errors="backslashreplace")


def report_bug(error: Exception) -> None:
    """Say that the fault is this program's, and write the whole traceback to a file in the temporary folder."""
    # A key on the command line is nobody's business who is sent this.
    command = re.sub(r"(--api-key[= ])\S+", r"\1...", shlex.join(["gpt", *sys.argv[1:]]))
    command += f"  ({DISTRIBUTION} {installed(DISTRIBUTION) or 'from the tree'}, torch {installed('torch')})"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="gpt-bug-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write("".join((command, "\n\n", *traceback.format_exception(error))))
        where = f"the whole traceback is in {file.name}; please report it"
    except OSError as failure:
        where = f"the traceback could not be written to a file ({failure.strerror})"
    last = "".join(traceback.format_exception_only(error)).strip()
    print(
        f"error: a bug of gpt, not of yours: {last}\n{command}\n{where}. {TRACEBACK}=1 shows it here.", file=sys.stderr
    )


def main() -> None:
    speak_utf8()
    open_streams()
    protect_children()
    rank: int | None = None
    try:
        if rank := rank_here():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one of many processes speaks
        try:
            Path.cwd()
        except FileNotFoundError:
            # In such a folder MKL, which torch computes with, ends the process.
            raise InputError("the working directory is gone; change to one that is there, such as: cd ~") from None
        app(prog_name="gpt")
    except InputError as error:
        if rank:
            # Most of these are the main process's too, which says it at once and has all of them ended.
            time.sleep(GRACE)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(InputError.exit_code)
    except BrokenPipeError:
        # The reader of a pipe, `head` say, has seen enough.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        # Libraries raise OSErrors of their own, in which the system has no part: those are not told apart from bugs.
        if isinstance(error, OSError) and not (error.filename is None and error.errno is None):
            where = f"{error.filename}: " if error.filename is not None else ""
            print(f"error: {where}{error.strerror}", file=sys.stderr)
            sys.exit(2)
        # Only a command that computes has imported it.
        runtime = sys.modules.get("engine.runtime")
        if isinstance(error, MemoryError | RuntimeError) and runtime is not None and runtime.is_out_of_memory(error):
            print(f"error: out of memory ({error}): ask for less at once, or use a smaller model", file=sys.stderr)
            sys.exit(2)
        # The agent that started one of many processes starts it again after an exception.
        if os.environ.get(TRACEBACK) or rank is not None:
            raise
        report_bug(error)
        sys.exit(1)
