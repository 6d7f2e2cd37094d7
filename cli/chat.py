"""gpt chat"""

import sys
from typing import TYPE_CHECKING, Annotated

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
from engine.errors import InputError

if TYPE_CHECKING:
    from cli.conversation import Conversation


def chat(
    path: RunArgument,
    system: Annotated[str, typer.Option(help="How to answer, told to the model before all else.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: SamplingSeed = None,
    device: Device = "auto",
    precision: GenerationPrecision = "auto",
    which: CheckpointName = "latest",
) -> None:
    """Talk to a model; a base model, not taught to answer, goes on from your text.

    Example: gpt chat runs/nano --temperature 0.7

    Example: echo "Tell me a story" | gpt chat runs/nano

    From a pipe each line is a message, never a command; for a base model the
    whole input is one text. Only what the model writes goes to standard output.
    """
    from cli.chat_terminal import ChatTerminal
    from cli.conversation import Conversation, Settings
    from engine import runtime
    from engine.run import Run

    def notice(message: str) -> None:
        print(message, file=sys.stderr)

    settings = Settings(temperature, top_k, top_p, min_p, repetition_penalty, seed, max_tokens)
    run = Run(path)
    recipe = run.read_recipe()
    model, tokenizer = run.load_model(runtime.choose(device, precision), which, notice)
    conversation = Conversation(model, tokenizer, settings, chat=recipe.chat, notice=notice)
    conversation.instruct(system)
    if sys.stdin.isatty() and sys.stdout.isatty():
        ChatTerminal(conversation).run()
    else:
        answer_pipe(conversation)


def answer_pipe(conversation: "Conversation") -> None:
    """Answer standard input on standard output, until it ends."""
    if not conversation.chat:
        conversation.notice("base model: it goes on from the text")
    try:
        for message in sys.stdin if conversation.chat else [sys.stdin.read()]:
            if message.strip():
                for text in conversation.ask(message.rstrip("\r\n")):
                    print(text, end="", flush=True)
                print(flush=True)
                if not conversation.answer.content:
                    conversation.notice("(no answer)")
    except UnicodeDecodeError:
        raise InputError("the input is not UTF-8") from None
