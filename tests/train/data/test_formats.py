"""Every format of conversations, told apart by its columns; the Hub's sets by their short names, without a network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.config import DataConfig
from engine.errors import InputError
from engine.tokenizer import Tokenizer
from tests.train.data.hub import Hub
from train.data.encoded import Conversations
from train.data.formats import Conversation
from train.data.loader import IGNORE_INDEX
from train.data.sources import open_conversations

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHARE_GPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
SAID = [("user", "hi"), ("assistant", "hello")]


def write(file: Path, rows: Sequence[object]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation]


def read(name: str, split: str = "train", **columns: Any) -> list[list[tuple[str, str]]]:
    source = open_conversations(DataConfig(source=name, **columns))
    assert source is not None
    return [said(conversation) for conversation in source.documents(split)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TURNS}, SAID),
        ({"conversations": SHARE_GPT, "id": 1}, SAID),
        (TURNS, SAID),
        (SHARE_GPT, SAID),
        ({"messages": [{"role": "system", "content": "be kind"}, *TURNS]}, [("system", "be kind"), *SAID]),
        ({"prompt": "hi", "response": "hello", "source": "x"}, SAID),
        ({"instruction": "hi", "context": "", "response": "hello", "category": "x"}, SAID),
        ({"instruction": "hi", "input": "there", "output": "hello", "text": "x"}, [("user", "hi\n\nthere"), SAID[1]]),
        ({"prompt": "hi", "messages": TURNS, "chosen": TURNS, "rejected": TURNS}, SAID),
        ({"text": "Words: hi\nStory: hello"}, [("user", "Words: hi"), SAID[1]]),
    ],
)
def test_the_format_is_recognised_by_its_columns(tmp_path: Path, row: object, expected: list[tuple[str, str]]) -> None:
    assert read(write(tmp_path / "a.jsonl", [row, row, row])) == [expected, expected]


def test_columns_can_be_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"ask": "hi", "reply": "hello", "talk": TURNS}] * 2)
    assert read(file, prompt_column="ask", response_column="reply") == [SAID]
    assert read(file, messages_column="talk") == [SAID]
    with pytest.raises(InputError, match=r"line 1: no column 'answer'; there are ask, reply, talk"):
        read(file, prompt_column="ask", response_column="answer")
    with pytest.raises(InputError, match="name --prompt-column and --response-column together"):
        read(file, prompt_column="ask")


@pytest.mark.parametrize("row", ["a text", {"text": "a text"}, {"story": "a text", "title": "b"}])
def test_other_rows_are_documents(tmp_path: Path, row: object) -> None:
    assert open_conversations(DataConfig(source=write(tmp_path / "a.jsonl", [row] * 2))) is None


def test_a_column_of_text_makes_documents_of_what_could_be_conversations(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "hi", "response": "hello"}] * 2)
    assert open_conversations(DataConfig(source=file, column="response")) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "hi", "response": 5}, "line 2: text was expected, not int"),
        ({"prompt": "hi"}, "line 2: no column 'response'; there are prompt"),
    ],
)
def test_a_bad_row_is_refused_by_its_line(tmp_path: Path, row: object, message: str) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "hi", "response": "hello"}, row])
    with pytest.raises(InputError, match=message):
        read(file)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "tool", "content": "x"}], "line 1: a message's role is 'tool'"),
        ("hi", "line 1: a list of turns"),
    ],
)
def test_bad_turns_are_refused_by_their_line(tmp_path: Path, turns: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / "a.jsonl", [{"messages": turns}]), messages_column="messages")


def message(number: int, parent: int | None, role: str, rank: int | None = None, lang: str = "en") -> dict[str, Any]:
    above = None if parent is None else str(parent)
    text = f"{role} {number}"
    return {"message_id": str(number), "parent_id": above, "text": text, "role": role, "rank": rank, "lang": lang}


FOREST = [
    message(1, None, "prompter"),
    message(2, 1, "assistant", rank=1),
    message(3, 1, "assistant", rank=0),
    message(4, 3, "prompter"),
    message(5, 4, "assistant"),
    message(6, 5, "prompter"),
    message(7, None, "prompter"),
    message(8, None, "prompter", lang="de"),
    message(9, 8, "assistant", lang="de"),
]
BEST = [("user", "prompter 1"), ("assistant", "assistant 3"), ("user", "prompter 4"), ("assistant", "assistant 5")]


def test_a_forest_gives_the_best_ranked_path_of_every_english_tree(tmp_path: Path) -> None:
    again = [
        {**each, "message_id": "b" + each["message_id"], "parent_id": each["parent_id"] and "b" + each["parent_id"]}
        for each in FOREST[:6]
    ]
    assert read(write(tmp_path / "a.jsonl", [*reversed(FOREST), *again])) == [BEST]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"message_id": ["1"]}, "a message with message_id was expected"),
        ({"parent_id": ["1"]}, "message 1 has a parent_id, rank or replies of another type"),
        ({"rank": "first"}, "message 1 has a parent_id, rank or replies of another type"),
        ({"replies": 3}, "message 1 has a parent_id, rank or replies of another type"),
        ({"replies": [[]]}, "a message with message_id was expected, not"),
        ({"replies": [message(1, 1, "assistant")]}, "message 1 answers itself"),
        ({"replies": [message(2, 1, "assistant"), message(1, 2, "prompter")]}, "message 1 answers itself"),
    ],
)
def test_a_tree_that_is_none_is_refused_with_its_line(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    rows = [message(7, None, "prompter"), {**message(1, None, "prompter"), **change}]
    with pytest.raises(InputError, match=f"a.jsonl, line 2: {expected}"):
        read(write(tmp_path / "a.jsonl", rows))


def test_a_turn_without_content_is_refused_and_one_with_none_is_empty(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "hello"}
    empty = [{"role": "user", "content": None}, answer]
    rows = [{"messages": [{"role": "user", "content": f"say {n}"}, answer]} for n in range(3)]
    found = read(write(tmp_path / "a.jsonl", [*rows, {"messages": empty}, *rows]))
    assert [("user", ""), ("assistant", "hello")] in found
    for turns in ([{"role": "user"}, answer], [{"role": "user", "content": "hi"}, {"role": "assistant"}]):
        with pytest.raises(InputError, match=r"a.jsonl, line 4: a turn has no content; there are role"):
            read(write(tmp_path / "a.jsonl", [*rows, {"messages": turns}]))


@pytest.mark.parametrize("nested", ["[" * 3000 + "]" * 3000, "[" * 950 + "]" * 950], ids=["deeper", "deep"])
def test_a_cell_of_deeply_nested_json_is_refused_with_its_line(nested: str, tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]).replace(
        '"', '""'
    )
    (tmp_path / "a.csv").write_text("messages\n" + f'"{turns}"\n' * 3 + f"{nested}\n")
    with pytest.raises(InputError, match=r"a.csv, line 5: a list of turns with role and content was expected"):
        read(str(tmp_path / "a.csv"))


def test_a_tree_a_row_gives_the_same(tmp_path: Path) -> None:
    def nested(each: dict[str, Any]) -> dict[str, Any]:
        return {**each, "replies": [nested(below) for below in FOREST if below["parent_id"] == each["message_id"]]}

    rows = [{"message_tree_id": "1", "prompt": nested(FOREST[0])}] * 2
    rows[1] = json.loads(json.dumps(rows[1]).replace('_id": "', '_id": "b'))
    assert read(write(tmp_path / "a.jsonl", rows)) == [BEST]


STORY = "Features: Dialogue\nStory: \n\nOne day.\nThe end.\nWords: quit, oak\n"


def test_story_instructions_are_read_line_by_line_in_any_order(tmp_path: Path) -> None:
    expected = [("user", "Features: Dialogue\nWords: quit, oak"), ("assistant", "One day.\nThe end.")]
    (tmp_path / "a.txt").write_text(f"{STORY}<|endoftext|>\n" * 2)
    assert read(str(tmp_path / "a.txt")) == [expected]
    lines = [{"text": line} for line in [*STORY.split("\n"), "<|endoftext|>"] * 2]
    assert read(write(tmp_path / "b.jsonl", lines)) == [expected]


@pytest.mark.parametrize(
    ("name", "path", "config", "rows"),
    [
        ("dolly", "databricks/databricks-dolly-15k", None, [{"instruction": "hi", "context": "", "response": "hello"}]),
        ("alpaca", "tatsu-lab/alpaca", None, [{"instruction": "hi", "input": "", "output": "hello", "text": "x"}]),
        ("smoltalk", "HuggingFaceTB/smoltalk", "all", [{"messages": TURNS, "source": "x"}]),
        ("smol-smoltalk", "HuggingFaceTB/smol-smoltalk", None, [{"messages": TURNS, "source": "x"}]),
        ("owner/name", "owner/name", None, [{"question": "hi", "answer": "hello"}]),
    ],
)
def test_hub_sets_are_known_by_short_name_or_by_their_columns(
    hub: Hub, name: str, path: str, config: str | None, rows: list[object]
) -> None:
    hub.rows(path, config or "", train=rows * 3, test=rows)
    assert (read(name), read(name, "validation"), read(name, "test")) == ([SAID] * 2, [SAID], [SAID])


def test_oasst1_ultrafeedback_and_tinystories_instruct_come_as_they_are_on_the_hub(hub: Hub) -> None:
    hub.rows("OpenAssistant/oasst1", train=FOREST, validation=FOREST)
    assert read("oasst1") == read("oasst1", "validation") == [BEST]
    rows = [{"prompt": "hi", "prompt_id": "1", "messages": TURNS, "chosen": TURNS, "rejected": TURNS}]
    hub.rows(
        "HuggingFaceH4/ultrafeedback_binarized", train_sft=rows * 3, test_sft=rows, train_prefs=rows, test_prefs=rows
    )
    assert (len(read("ultrafeedback")), read("ultrafeedback", "test")) == (2, [SAID])
    lines = [{"text": line} for line in [*STORY.split("\n"), "<|endoftext|>"]]
    hub.rows("roneneldan/TinyStoriesInstruct", train=lines, validation=lines)
    assert read("tinystories-instruct")[0][1] == ("assistant", "One day.\nThe end.")


@pytest.mark.parametrize("known", [True, False])
def test_an_empty_answer_is_left_out_counted_and_named(tmp_path: Path, hub: Hub, known: bool) -> None:
    # The first row among them: what the file holds is not decided by one row.
    rows = [{"instruction": "hi", "input": "", "output": output} for output in (None, "hello", " ", "hello", "hello")]
    hub.rows("tatsu-lab/alpaca", train=rows)
    name = "alpaca" if known else write(tmp_path / "a.jsonl", rows)
    source = open_conversations(DataConfig(source=name))
    assert source is not None
    assert [said(conversation) for conversation in source.documents("train")] == [SAID] * 2
    where = "tatsu-lab/alpaca, row 1" if known else f"{name}, line 1"
    assert source.skipped == {"without an answer to learn": (2, where)}
    assert source.describe_read(2) == (
        f"2 documents of 5 rows read; 2 left out, without an answer to learn (first: {where})"
    )


def test_answers_that_are_no_text_are_an_error_and_never_another_task(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "hi", "answer": ["hello"]}] * 3)
    with pytest.raises(InputError, match=r"line 1: text was expected, not list"):
        read(file)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "hi"}], "prompt holds questions, and nothing answers them"),
        (
            [{"prompt": "hi", "chosen": "a", "rejected": "b"}],
            "these are preferences; learn from them with `gpt reward`",
        ),
    ],
)
def test_questions_alone_and_preferences_are_no_conversations(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_conversations(DataConfig(source=write(tmp_path / "a.jsonl", rows)))


YES, NO = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
ASKED = {"role": "user", "content": "2 + 2?"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system_prompt": "be kind", "question": "hi", "response": "hello"}, [("system", "be kind"), *SAID]),
        ({"system": "be kind", "messages": TURNS}, [("system", "be kind"), *SAID]),
        ({"system": "", "prompt": "hi", "response": "hello"}, SAID),
        ({"prompt": "hi", "response": "hello", "history": [["a", "b"]]}, [("user", "a"), ("assistant", "b"), *SAID]),
        ({"prompt": "hi", "response": "hello", "history": None, "label": True, "weight": 1, "tools": "[]"}, SAID),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, SAID),
        ({"messages": json.dumps(TURNS)}, SAID),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TURNS[1]]}, SAID),
    ],
)
def test_what_changes_the_meaning_of_a_row_is_heeded(
    tmp_path: Path, row: object, expected: list[tuple[str, str]]
) -> None:
    assert read(write(tmp_path / "a.jsonl", [row])) == [expected]


@pytest.mark.parametrize("unlearnt", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_a_turn_of_weight_0_is_gone_on_from_and_not_learnt(
    tmp_path: Path, tokenizer: Tokenizer, unlearnt: dict[str, object]
) -> None:
    row = {"messages": [ASKED, {**NO, **unlearnt}, {"role": "user", "content": "No."}, YES]}
    source = open_conversations(DataConfig(source=write(tmp_path / "a.jsonl", [row])))
    assert source is not None
    conversations = Conversations(tokenizer, 48)
    for messages in source.documents("train"):
        conversations.add(messages, "here")
    inputs, targets = conversations.read(0, 0, conversations.tokens)
    learnt = targets[targets != IGNORE_INDEX].tolist()
    assert learnt == [*tokenizer.encode("4"), tokenizer.special["<|end|>"]]
    assert tokenizer.encode("5")[-1] in inputs and conversations.answers == 1


@pytest.mark.parametrize(
    ("rows", "skipped"),
    [
        ([{"prompt": "hi", "completion": "hello", "label": bool(n)} for n in (1, 0)], "labelled as bad answers"),
        ([{"messages": TURNS, "kto_tag": bool(n)} for n in (1, 0)], "labelled as bad answers"),
        ([{"prompt": "hi", "response": "hello", "weight": n} for n in (1.0, 0.0)], "of weight 0"),
        ([{"prompt": prompt, "response": "hello"} for prompt in ("hi", None)], "without a question"),
        ([{"messages": turns} for turns in (TURNS, None)], "without an answer to learn"),
        ([{"messages": turns} for turns in (TURNS, TURNS[:1])], "without an answer to learn"),
        (
            [{"messages": [*TURNS, *more]} for more in ([], [ASKED, {**YES, "content": None}])],
            "without an answer to learn",
        ),
    ],
)
def test_rows_that_are_not_to_be_learnt_are_skipped_and_counted(
    tmp_path: Path, rows: list[object], skipped: str
) -> None:
    name = write(tmp_path / "a.jsonl", rows)
    source = open_conversations(DataConfig(source=name))
    assert source is not None
    assert [said(conversation) for conversation in source.documents("train")] == [SAID]
    assert source.skipped == {skipped: (1, f"{name}, line 2")}


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED, CALL, *TURNS]}, "line 1: there are tool_calls"),
        ({"messages": TURNS, "tools": [{"name": "w"}]}, "line 1: there are tools"),
        ({"prompt": "hi", "response": "hello", "images": ["a.png"]}, "line 1: there are images"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, YES]}, "line 1: a turn holds 'image_url'"),
        ({"messages": [ASKED, {**YES, "weight": 0.5}]}, r"line 1: weight is 0.5; .* learnt \(1\) or not \(0\)"),
        ({"prompt": "hi", "response": "hello", "history": ["a"]}, "line 1: history holds pairs"),
    ],
)
def test_what_cannot_be_heeded_is_refused_by_name(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / "a.jsonl", [row]))


def test_deleted_replies_are_not_learnt(tmp_path: Path) -> None:
    rows = [{**row, "deleted": row["message_id"] == "3"} for row in FOREST[:6]]
    assert read(write(tmp_path / "a.jsonl", rows)) == [[BEST[0], ("assistant", "assistant 2")]]


def test_chat_rows_that_datasets_wrote_as_json_text_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    # Turns of several shapes: datasets 5 stores what it has no one type for as JSON text.
    parts = [{"type": "text", "text": "hi"}]
    rows = [{"messages": [{"role": "user", "content": content}, TURNS[1]]} for content in ("hi", parts)]
    loaded = datasets.load_dataset(
        "json", data_files=write(tmp_path / "a.jsonl", rows), split="train", cache_dir=str(tmp_path / "cache")
    )
    loaded.to_parquet(str(tmp_path / "a.parquet"))
    assert read(str(tmp_path / "a.parquet")) == read(str(tmp_path / "a.jsonl")) == [SAID]


def test_without_the_hub_the_error_says_what_to_do(hub: Hub) -> None:
    with (
        hub.away(),
        pytest.raises(InputError, match=r"databricks-dolly-15k: .* cannot be reached .*stories-instruct"),
    ):
        read("dolly")
