"""gpt generate"""

import sys
from typing import Annotated, Any

import typer

from cli.options import (
    CheckpointName,
    Device,
    GenerationPrecision,
    MaxTokens,
    MinP,
    RepetitionPenalty,
    RunArgument,
    SamplingSeed,
    Temperature,
    TopK,
    TopP,
)


def generate(
    path: RunArgument,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; nothing begins a document.")] = "",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many texts.")] = 1,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")] = None,
    seed: SamplingSeed = None,
    device: Device = "auto",
    precision: GenerationPrecision = "auto",
    which: CheckpointName = "latest",
) -> None:
    """Let a model go on from a prompt.

    Example: gpt generate runs/nano "Once upon a time" --temperature 0.7 --seed 1
    """
    from engine import runtime
    from engine.chat_template import text_ends
    from engine.generate import document_prompt, generate, stream
    from engine.run import Run
    from engine.sampling import Sampling

    def notice(message: str) -> None:
        print(message, file=sys.stderr)

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    run = Run(path)
    model, tokenizer = run.load_model(runtime.choose(device, precision), which, notice)
    prompts, ends = [document_prompt(tokenizer, prompt)] * count, text_ends(tokenizer, chat=run.read_recipe().chat)
    limits: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop or (), "stop_ids": ends}
    if count == 1:
        print(prompt, end="")
        for piece in stream(model, tokenizer, prompts, sampling, **limits):
            print(piece.text, end="", flush=True)
        print()
        return
    for number, completion in enumerate(generate(model, tokenizer, prompts, sampling, **limits), 1):
        print(f"--- {number} ---\n{prompt}{completion.text}")
