"""Options that several commands share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

from engine.errors import InputError

RunArgument = Annotated[Path, typer.Argument(help="Folder of a run, such as runs/nano.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N. auto is the GPU where there is one.")]
Precision = Annotated[
    str, typer.Option(help="auto, fp32, bf16 or fp16. auto is bf16 where the hardware multiplies it.")
]
GenerationPrecision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="auto, fp32, bf16, fp16, or on a CPU int8: faster at few texts at once, and not quite the same ones.",
    ),
]
CheckpointName = Annotated[str, typer.Option("--checkpoint", help="latest, best, or a step.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="At most so many tokens; else up to the context.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")]
TopP = Annotated[float, typer.Option(help="Choose among the likeliest tokens that hold this share.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: repeat less.")]
SamplingSeed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")]
Column = Annotated[str | None, typer.Option(help="The column that holds the text, where it is not the obvious one.")]
PromptColumn = Annotated[str | None, typer.Option(help="The column of the requests.")]
ResponseColumn = Annotated[str | None, typer.Option(help="The column of the answers.")]
ChosenColumn = Annotated[str | None, typer.Option(help="The column of the better answers; chosen unless given.")]
RejectedColumn = Annotated[str | None, typer.Option(help="The column of the worse answers; rejected unless given.")]
MessagesColumn = Annotated[str | None, typer.Option(help="The column of whole conversations.")]
Results = Annotated[Path, typer.Option("--out", help="Folder for the results: JSON, plots.")]


def integers(option: str, text: str) -> list[int]:
    """The numbers of an option that takes several, with commas between. Raises InputError."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise InputError(f"{option} is {text!r}; it takes whole numbers above 0 with commas between")
    return found
