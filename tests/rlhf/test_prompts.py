"""Prompts: read with answers or without, whole up to where the answer begins."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.chat_template import Message, answer_prompt
from engine.config import DataConfig
from engine.errors import InputError
from engine.tokenizer import Tokenizer
from rlhf.prompts import Prompts, encode_prompts, open_prompts

ASKED = [{"role": "user", "content": "2 + 2?"}]
ANSWER = {"role": "assistant", "content": "4"}


def read(file: Path, rows: Sequence[object], tokenizer: Tokenizer, context: int = 48) -> Prompts:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return encode_prompts(open_prompts(DataConfig(source=str(file))), "train", tokenizer, context, 100)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?"},
        {"prompt": ASKED},
        {"messages": ASKED},
        ASKED,
        {"messages": [*ASKED, ANSWER]},
        {"question": "2 + 2?", "answer": None},
        {"question": "2 + 2?", "answer": "a very long answer " * 50},
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    ],
)
def test_prompts_need_no_answers_and_answers_do_not_count(tmp_path: Path, tokenizer: Tokenizer, row: object) -> None:
    prompts = read(tmp_path / "a.jsonl", [row] * 3, tokenizer)
    assert prompts.asked == [[Message("user", "2 + 2?")]] * 2 and prompts.dropped == 0
    assert prompts[0].ids == tuple(answer_prompt(tokenizer, prompts.asked[0]))
    assert prompts.describe() == "2 prompts of 3 rows, 0 with a system text"


def test_a_prompt_holds_all_that_was_said_before_the_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    more = [{"role": "user", "content": "Why?"}]
    told = [Message("user", "2 + 2?"), Message("assistant", "4"), Message("user", "Why?")]
    assert read(tmp_path / "a.jsonl", [{"messages": [*ASKED, ANSWER, *more]}], tokenizer).asked == [told]
    row = {"system": "Be kind.", "prompt": "Why?", "history": [["2 + 2?", "4"]]}
    assert read(tmp_path / "b.jsonl", [row], tokenizer).asked == [[Message("system", "Be kind."), *told]]


def test_prompts_that_leave_no_room_or_ask_nothing_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": text} for text in ("the little fox " * 40, "held out", "", "2 + 2?", "3 + 3?")]
    prompts = read(tmp_path / "a.jsonl", rows, tokenizer)
    assert prompts.describe() == (
        "2 prompts of 5 rows, 0 with a system text; 1 left out, longer than the context; "
        f"1 left out, without a question (first: {tmp_path}/a.jsonl, line 3)"
    )


def test_documents_are_no_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="holds documents; prompts come from"):
        read(tmp_path / "a.jsonl", [{"text": "a story"}], tokenizer)
