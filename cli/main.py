"""The door: one Typer app, and the place where an InputError becomes a sentence and exit code 2."""

import os
import sys

import typer

from cli import (
    bench,
    bench_kernels,
    chat,
    data,
    demo,
    doctor,
    evaluate,
    finetune,
    generate,
    huggingface,
    info,
    plan,
    reward,
    rlhf,
    serve,
    tokenizer,
    train,
)
from engine.errors import InputError

app = typer.Typer(
    name="gpt",
    help="A GPT from raw text to a chat model, with its own kernels. Start with: gpt train nano",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("train")(train.train)
app.command("demo")(demo.demo)
app.command("finetune")(finetune.finetune)
app.command("evaluate")(evaluate.evaluate)
app.command("reward")(reward.reward)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("info")(info.info)
app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("export")(huggingface.export_run)
app.command("import")(huggingface.import_folder)
app.command("bench-train")(bench.bench_train)
app.command("bench-attention")(bench_kernels.bench_attention)
app.command("bench-layernorm")(bench_kernels.bench_layernorm)
app.command("bench-cross-entropy")(bench_kernels.bench_cross_entropy)
app.command("bench-decode")(bench.bench_decode)
app.command("bench-decode-attention")(bench_kernels.bench_decode_attention)
app.command("bench-serving")(bench.bench_serving)
app.command("bench-compile")(bench.bench_compile)
app.command("bench-quality")(bench.bench_quality)
app.add_typer(rlhf.app, name="rlhf")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")


def main() -> None:
    main_process = os.environ.get("RANK", "0") == "0"
    if not main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one of many processes speaks
    try:
        app()
    except InputError as error:
        if main_process:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of a pipe, `head` say, has seen enough.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
