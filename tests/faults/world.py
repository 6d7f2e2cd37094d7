"""A small world that cases are copies of: text, conversations, preferences, prepared data, and a run of every kind."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults import child

SMALL = (
    "--device cpu --precision fp32 --set model.width=16 --set model.blocks=1 --set model.heads=2 "
    "--set model.context=64 --set loop.batch=4 --set data.final_evaluation_tokens=500 --set loop.samples=0"
)
TUNE = "--device cpu --precision fp32 --batch 2 --set data.final_evaluation_tokens=500 --set loop.samples=0"
ANIMALS = ("fox", "owl", "hen", "cat", "dog", "bee", "elk", "ant", "bat", "cow")
PROMPT = "The fox"

STEPS = [
    "data prepare words.txt --out ready --vocab-size 320 --workers 1",
    f"train nano --data ready --out base --steps 4 --set loop.save_every=2 {SMALL}",
    f"finetune base --data chats.jsonl --out chat --steps 2 {TUNE}",
    f"reward chat --data pairs.jsonl --out reward --steps 1 {TUNE}",
    "export base --out hf",
    "evaluate base --count 2 --tokens 200 --device cpu --precision fp32",
    "tokenizer train --data words.txt --vocab-size 320 --out tokenizer.model",
]


def documents() -> list[str]:
    return [
        f"A {ANIMALS[n % 10]} called number {n} went out on day {n * 7 % 31}. The {ANIMALS[n // 10 % 10]} was glad."
        for n in range(240)
    ]


def lines(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_texts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words.txt").write_text("<|endoftext|>\n".join(f"{text}\n" for text in documents()))
    lines(folder / "words.jsonl", [{"text": text} for text in documents()])
    lines(folder / "chats.jsonl", [{"prompt": f"say {n}", "response": f"{n}!"} for n in range(120)])
    lines(folder / "pairs.jsonl", [{"prompt": f"say {n}", "chosen": f"{n}!", "rejected": f"{n}?"} for n in range(120)])


def make(folder: Path) -> Path:
    """Make it, in a forked process a command. Raises RuntimeError where one fails."""
    write_texts(folder)
    for step in STEPS:
        done = child.run(_small(step), folder, 120)
        if done.code:
            raise RuntimeError(f"gpt {step}\n{done.said}")
    return folder


def _small(step: str) -> Callable[[], None]:
    def work() -> None:
        import rlhf.reward_model

        rlhf.reward_model.ANSWERS = 4
        child.gpt(*step.split())()

    return work


def text_of(run: Path | str) -> str:
    """The words of a command that writes the same text every time."""
    return f"generate {run} --temperature 0 --max-tokens 12 --device cpu --precision fp32"
