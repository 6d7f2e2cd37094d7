"""gpt generate: a model goes on from a prompt."""

from typing import Annotated, Any

from typer import Argument, Option

from cli.options import Few, ModelOptions, RunArgument, SamplingOptions


def generate(
    path: RunArgument,
    sampling: SamplingOptions,
    model: ModelOptions,
    prompt: Annotated[str, Argument(help="The text to go on from; nothing begins a document.")] = "",
    count: Annotated[Few, Option("--count", "-n", help="How many texts.")] = 1,
    stop: Annotated[list[str] | None, Option(help="End before this text. Repeatable.")] = None,
) -> None:
    """Let a model go on from a prompt.

    Example: gpt generate runs/nano "Once upon a time" --temperature 0.7 --seed 1
    """
    from cli.conversation import Settings
    from engine.chat_template import text_ends
    from engine.generate import document_prompt, generate, stream
    from engine.run import Run

    settings, run = Settings(**vars(sampling)), Run(path)
    network, tokenizer = model.load(run)
    prompts = [document_prompt(tokenizer, prompt)] * count
    ends = text_ends(tokenizer, chat=run.read_recipe().chat)
    limits: dict[str, Any] = {"max_tokens": settings.max_tokens, "stop": stop or (), "stop_ids": ends}
    if count == 1:
        print(prompt, end="")
        for chunk in stream(network, tokenizer, prompts, settings, **limits):
            print(chunk.text, end="", flush=True)
        print()
        return
    for number, completion in enumerate(generate(network, tokenizer, prompts, settings, **limits), 1):
        print(f"--- {number} ---\n{prompt}{completion.text}")
