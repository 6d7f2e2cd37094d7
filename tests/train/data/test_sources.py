"""Every name of data, every split, and every way in which a file can be wrong."""

import builtins
import json
import pickle
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import hub as engine_hub
from engine.errors import InputError
from tests.train.data.hub import Hub, lines
from train.data.sources import HubUnreachable, open_source
from train.data.splits import SPLITS, is_held_out

CONFIGS = (
    b"---\nconfigs:\n- {config_name: small, data_files: small/*}\n- {config_name: large, data_files: large/*}\n---\n"
)


def read(name: Path | str, split: str = "train", **options: Any) -> list[str]:
    return list(open_source(str(name), **options).documents(split))


def write_rows(file: Path, rows: Sequence[object]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def refusal(file: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(file, **options)
    return str(caught.value)


@given(st.floats(0.01, 0.5), st.integers(0, 10**12))
def test_one_document_of_every_block_is_held_out(holdout: float, block: int) -> None:
    size = max(2, round(1 / holdout))
    assert sum(is_held_out(block * size + place, holdout) for place in range(size)) == 1


def test_train_and_validation_share_nothing_and_lose_nothing(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": f"document {n}"} for n in range(500)])
    train, validation = read(file), read(file, "validation")
    assert len(validation) == 10
    assert sorted(train + validation) == sorted(f"document {n}" for n in range(500))


def test_two_documents_are_enough_for_two_splits(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", ["first", "second"])
    assert (read(file), read(file, "validation")) == (["first"], ["second"])


def test_a_single_document_cannot_be_validated_on(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": "only"}])
    with pytest.raises(InputError, match="no text for the validation split: it has fewer than two documents"):
        read(file, "validation")


def test_documents_can_begin_anywhere(tmp_path: Path) -> None:
    source = open_source(str(write_rows(tmp_path / "a.jsonl", [f"document {n}" for n in range(120)])))
    everything = list(source.documents("train"))
    assert all(list(source.documents("train", start)) == everything[start:] for start in (0, 1, 50, 117, 200))


def test_limit_bounds_what_is_read(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [f"document {n}" for n in range(120)])
    assert len(read(file, limit=50)) + len(read(file, "validation", limit=50)) == 50


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in ("one", "", " \n", None, "two", "three")])
    source = open_source(str(file))
    assert list(source.documents("train")) == ["one", "three"]
    assert source.skipped == {"empty": (3, f"{file}, line 2")}
    assert source.describe_read(2) == f"2 documents of 6 rows read; 3 left out, empty (first: {file}, line 2)"


def test_half_a_surrogate_pair_becomes_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"broken \\ud83d here"\n')
    assert read(tmp_path / "a.jsonl") == ["broken ? here"]


def test_a_source_survives_pickling(tmp_path: Path) -> None:
    source = open_source(str(write_rows(tmp_path / "a.jsonl", ["first", "second", "third"])))
    again = pickle.loads(pickle.dumps(source))
    assert list(again.documents("train")) == ["first", "third"]
    assert again.fingerprint() == source.fingerprint()


def test_fingerprint_changes_with_content_and_options_only(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", ["first", "second"])
    before = open_source(str(file)).fingerprint()
    file.touch()
    assert open_source(str(file)).fingerprint() == before
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(file, tmp_path / "elsewhere")
    assert open_source(str(tmp_path / "elsewhere/a.jsonl")).fingerprint() == before
    assert open_source(str(file), limit=1).fingerprint() != before
    write_rows(file, ["first", "zecond"])
    assert open_source(str(file)).fingerprint() != before


def test_stories_have_three_splits() -> None:
    splits = {split: read("stories", split, limit=5) for split in SPLITS}
    assert all(len(texts) == 5 and all(texts) for texts in splits.values())
    assert list(open_source("stories", limit=5).documents("train", 3)) == splits["train"][3:]


# Formats.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "first"}\n\n{"text": "second\\n"}\n'),
        ("a.json", '[{"text": "first"}, {"text": "second\\n"}]'),
        ("lines.json", '{"text": "first"}\n{"text": "second\\n"}\n'),
        ("strings.json", '["first", "second\\n"]'),
        ("a.csv", 'id,text\n1,first\n2,"second\n"\n'),
        ("semicolon.csv", 'id;text\n1;first\n2;"second\n"\n'),
        ("tab.csv", '\ufeffid\ttext\n1\tfirst\n2\t"second\n"\n'),
        ("a.txt", "first\n<|endoftext|>\nsecond\n<|endoftext|>\n"),
        ("A.TXT", "\ufefffirst\r\n<|endoftext|>\r\nsecond\r\n"),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_bytes(content.encode())
    both = read(file, holdout=0.5) + read(file, "validation", holdout=0.5)
    assert [text.rstrip() for text in both] == ["first", "second"]


def test_parquet_gives_its_text_column(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"id": n, "story": f"story {n}"} for n in range(3)]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["story 0", "story 2"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    assert "bad.parquet: damaged, or no parquet file" in refusal(tmp_path / "bad.parquet")


def test_columns_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    """A number of thousands of digits, a date beyond the calendar, a title that is no UTF-8: none of it is the text."""
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "number.jsonl").write_text('{"text": "first"}\n{"text": "second", "id": ' + "7" * 5000 + "}\n")
    assert read(tmp_path / "number.jsonl", holdout=0.5) == ["first"]
    far = pyarrow.array([2**31 - 1] * 3, pyarrow.int32()).cast(pyarrow.date32())
    buffers = pyarrow.array([b"caf\xe9"] * 3, pyarrow.binary()).buffers()
    titles = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    texts = pyarrow.array(["a", "b", "c"])
    parquet.write_table(pyarrow.table({"day": far, "title": titles, "text": texts}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", "c"]
    for column in ("day", "title"):
        message = refusal(tmp_path / "a.parquet", column=column)
        assert f"a.parquet, row 1: column {column!r} cannot be read" in message


def test_a_parquet_file_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    from train.data.rows import read_rows

    monkeypatch.setattr("train.data.rows.BLOCK", 7)
    rows = [{"id": n, "text": f"text {n}", "late": f"late {n}"} for n in range(100)]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10)
    assert sorted(read(tmp_path / "a.parquet") + read(tmp_path / "a.parquet", "validation")) == sorted(
        str(row["text"]) for row in rows
    )
    found = [row for _, row in read_rows(tmp_path / "a.parquet")]
    # A column that is first asked for in the middle, and one that is gone back in.
    assert [found[place]["late"] for place in (50, 99, 3)] == ["late 50", "late 99", "late 3"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"contents": "this", "metadata": "x"}, None, "this"),
        ({"story": "this", "title": "x"}, None, "this"),
        ({"n": 1, "only": "this"}, None, "this"),
        ({"text": "x", "other": "this"}, "other", "this"),
    ],
)
def test_the_text_column_is_picked_or_given(tmp_path: Path, row: object, column: str | None, expected: str) -> None:
    assert read(write_rows(tmp_path / "a.jsonl", [row]), column=column) == [expected]


@given(st.lists(st.text("ab \n", max_size=300), max_size=30).map("\n\n".join), st.integers(64, 300))
def test_cutting_a_long_text_loses_nothing_and_keeps_the_bounds(text: str, cut: int) -> None:
    from train.data.rows import cut_text

    parts = list(cut_text(text.splitlines(keepends=True), cut))
    assert "".join(parts) == text
    assert all(len(part) <= 2 * cut for part in parts)
    assert all(len(part) >= cut // 2 for part in parts[:-1])


@pytest.mark.parametrize("verse", ["A line of verse,\nand another line.\n\n", "one long line without an end "])
@pytest.mark.parametrize("repeats", [100, 20_000])
def test_one_long_text_file_has_something_to_hold_out(tmp_path: Path, verse: str, repeats: int) -> None:
    file = tmp_path / "play.txt"
    file.write_text(verse * repeats)
    train, validation = read(file), read(file, "validation")
    assert len(validation) >= 1
    assert len("".join(train + validation)) == len(verse) * repeats
    assert max(map(len, train)) <= 16_384


# Folders, globs, splits.


def test_folders_and_globs_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "deep/a.jsonl", "deep/c.csv", ".hidden.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text({"a.jsonl": '"a"', "c.csv": "text\nc"}.get(Path(name).name, name))
    assert read(tmp_path, holdout=0.1) == ["b.txt", "c"]
    assert read(tmp_path / "**" / "*.jsonl") == ["a"]


def test_files_named_after_splits_are_those_splits(tmp_path: Path) -> None:
    for name in ("train-0", "extra", "tiny_val", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [f"{name} {n}" for n in range(3)])
    assert read(tmp_path) == [f"{name} {n}" for name in ("extra", "train-0") for n in range(3)]
    assert read(tmp_path, "validation") == [f"tiny_val {n}" for n in range(3)]
    assert read(tmp_path, "test") == [f"test {n}" for n in range(3)]


def test_what_is_merely_called_test_is_trained_on(tmp_path: Path) -> None:
    write_rows(tmp_path / "my_test.jsonl", [f"text {n}" for n in range(3)])
    assert len(read(tmp_path)) == len(read(tmp_path / "*.jsonl")) == len(read(tmp_path / "my_test.jsonl")) == 2


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train/part-0", "validation/part-0"),
        ("default/train/0", "default/dev/0"),
        ("training", "validation"),
        ("corpus", "validation"),
        ("corpus", "tiny val-00001"),
        ("train/dev-notes", "valid/train-0"),  # a folder's name counts before a file's
    ],
)
def test_splits_are_told_by_folders_and_names_as_datasets_does(tmp_path: Path, train: str, held_out: str) -> None:
    for name, count in ((train, 5), (held_out, 2)):
        (tmp_path / f"{name}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / f"{name}.jsonl", [f"{name} {n}" for n in range(count)])
    source = open_source(str(tmp_path))
    assert len(list(source.documents("train"))) == 5
    assert [*source.documents("validation")] == [f"{held_out} {n}" for n in range(2)]
    assert source.held_out_by.startswith("the data's own validation split, by the name of the f")
    assert f"{held_out}.jsonl" in source.held_out_by


def test_the_folders_above_the_data_name_no_split(tmp_path: Path) -> None:
    (tmp_path / "validation" / "test").mkdir(parents=True)
    for name in ("a", "b"):
        write_rows(tmp_path / f"validation/test/{name}.jsonl", [f"{name} {n}" for n in range(3)])
    assert len(read(tmp_path / "validation")) == len(read(tmp_path / "validation/test/*.jsonl")) == 5


def test_what_an_editor_or_a_system_hides_is_no_data(tmp_path: Path) -> None:
    for folder in (".ipynb_checkpoints", "__MACOSX", ".git/deep"):
        (tmp_path / folder).mkdir(parents=True)
        write_rows(tmp_path / folder / "stories.jsonl", ["copy"])
    write_rows(tmp_path / "stories.jsonl", [f"text {n}" for n in range(4)])
    assert len(read(tmp_path)) == len(read(tmp_path / "**/*.jsonl")) == 3
    # But what is asked for by its name is read.
    assert read(tmp_path / ".git" / "*" / "*.jsonl", holdout=0.5) == ["copy"]


def test_where_all_are_equal_some_are_held_out_all_the_same_and_it_is_said(tmp_path: Path) -> None:
    source = open_source(str(write_rows(tmp_path / "a.jsonl", ["one text"] * 60)))
    assert (len(list(source.documents("train"))), len(list(source.documents("validation")))) == (59, 1)
    assert source.held_out_by == "one in 50 of the documents by their number: all are equal"


def test_equal_documents_stand_on_one_side(tmp_path: Path) -> None:
    texts = [f"text {n % 200}" for n in range(1000)]
    file = write_rows(tmp_path / "a.jsonl", texts)
    train, validation = read(file), read(file, "validation")
    assert not {*train} & {*validation} and len(train) + len(validation) == 1000
    assert len({*validation}) == 4


# Bad input: one message with the place and the way out.


# Deep enough that its text can be read, and no longer be written everywhere.
DEEP = b"[" * 900 + b"]" * 900


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a.txt has no text for the train split: it is empty"),
        (
            "a.jsonl",
            b'""\n""\n',
            r"a.jsonl has no text for the train split: 2 left out, empty \(first: .*a.jsonl, line 1\)",
        ),
        ("a.jsonl", b'{"text": "good"}\n{"text": \n', r"a.jsonl, line 2: broken JSON .*; fix or delete the line"),
        ("a.json", b'[\n{"text": "good"},\n}]', r"a.json, line 3: broken JSON .*; fix the file"),
        ("a.jsonl", b'{"text": "good"}\n{"txt": "bad"}\n', r"a.jsonl, line 2: no column 'text'; there are txt: choose"),
        (
            "a.jsonl",
            b'{"prompt": "a", "response": "b"}',
            r"which column is the text\? There are prompt, response: choose",
        ),
        ("a.jsonl", b'{"n": 1}', r"which column is the text\? There are n: choose one with --column"),
        ("a.jsonl", b"[1, 2]\n", r"a.jsonl, line 1: a JSON object with a text column was expected, not '\[1, 2\]'"),
        ("a.jsonl", b'{"text": "good"}\n{"text": 5}\n', r"a.jsonl, line 2: column 'text' holds int, not text"),
        ("a.csv", b'text\n"never closed\n', r"a.csv, line 2: broken CSV"),
        (
            "a.csv",
            b"id,text\n1,cold, and dark\n",
            r"a.csv, line 2: 3 fields where the first line names 2 \(id, text\); .*','",
        ),
        ("a.csv", b"id,text\n\n1\n", r"a.csv, line 3: 1 fields where the first line names 2"),
        ("a.csv", b"text,text\na,b\n", r"a.csv, line 1: two columns have one name"),
        ("a.csv", b"id,text,id\na,b,c\n", r"a.csv, line 1: two columns have one name, 'id', of id, text, id; rename"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b", "text": "c"}\n',
            r"a.jsonl, line 2: broken JSON \('text' is named",
        ),
        ("a.json", b'[\n{"text": "a"},\n{"text": "b", "text": "c"}]', r"a.json, line 3: broken JSON \('text' is named"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"n": ' + DEEP + b"}\n",
            r"a.jsonl, line 2: broken JSON \(its values are nested",
        ),
        (
            "a.json",
            b'[{"text": "a"},\n{"n": ' + DEEP + b"}]",
            r"a.json, line 2: broken JSON \(its values are nested",
        ),
        (
            "a.jsonl",
            b'{"text": "b"}\n{"text": ' + b"1" * 5000 + b"}\n",
            r"a.jsonl, line 2: column 'text' holds float, not text",
        ),
        ("a.jsonl", b'{"text": "b"}\n{"text": NaN}\n', r"a.jsonl, line 2: column 'text' holds float, not text"),
        ("a.jsonl", b'{"id": "a", "messages": []}', r"which column is the text\?.* learnt by `gpt finetune`"),
        ("a.jsonl", b'{"prompt": "a"}', r"which column is the text\?.* learnt by `gpt finetune`"),
        ("a.txt", b"good\nna\xefve\n", r"a.txt, line 2, byte 3: not UTF-8 text"),
        ("a.csv", b"text\ncaf\xe9\n", r"a.csv, line 2, byte 4: not UTF-8 text"),
        ("a.txt", b"\x7fELF\x02\x00\x00", r"a.txt, line 1, byte 6: not UTF-8 text \(zero byte\); .* binary"),
        ("a.jsonl", "\ufefftext".encode("utf-16"), r"a.jsonl, line 1, byte \d: not UTF-8 text"),
        ("a.pdf", b"%PDF", r"a.pdf: nothing to read there; text comes as .txt .jsonl .json .csv .parquet"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(message, refusal(tmp_path / name))


def test_a_column_named_twice_in_a_parquet_file_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table([pyarrow.array(["one"]), pyarrow.array(["two"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet: two columns have one name, 'text', of text, text; rename one" in refusal(tmp_path / "a.parquet")


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": "x", "title": "y"}])
    assert "line 1: no column 'body'; there are text, title: choose one with --column" in refusal(file, column="body")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.txt", "no such file: nothing.txt"),
        ("./nothing", "no such file: ./nothing"),
        ("nothing-*.jsonl", "no file matches"),
        ("nothing", "no data is called 'nothing'"),
        ("a/b/c", "no data is called 'a/b/c'"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(name)


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="held-out share"):
        open_source("stories", holdout=0.0)
    with pytest.raises(InputError, match="limit of 0"):
        open_source("stories", limit=0)
    with pytest.raises(InputError, match="no split 'dev'"):
        read("stories", "dev")
    with pytest.raises(InputError, match="has no test split"):
        read(write_rows(tmp_path / "a.jsonl", ["a", "b"]), "test")


def test_files_are_read_without_the_datasets_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] in ("datasets", "huggingface_hub", "pyarrow"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert read(write_rows(tmp_path / "a.jsonl", ["a", "b"])) == ["a"]
    with pytest.raises(InputError, match="pip install datasets"):
        read("tinystories")
    (tmp_path / "a.parquet").touch()
    with pytest.raises(InputError, match="pip install pyarrow"):
        read(tmp_path / "a.parquet")


# The hub.


def test_a_hub_set_uses_its_own_splits(hub: Hub) -> None:
    hub.rows("roneneldan/TinyStories", train=[{"text": "a"}, {"text": "b"}], validation=[{"text": "c"}])
    assert (read("tinystories"), read("tinystories", "validation")) == (["a", "b"], ["c"])
    with pytest.raises(InputError, match="tinystories has no test split"):
        read("tinystories", "test")


def test_a_hub_set_without_validation_is_held_out_from(hub: Hub) -> None:
    hub.rows("stanford-crfm/DSIR-filtered-pile-50M", train=[{"contents": str(n), "metadata": {}} for n in range(100)])
    assert (len(read("dsir-pile")), len(read("dsir-pile", "validation"))) == (98, 2)
    assert len(read("dsir-pile", limit=10)) == 9


def test_any_hub_set_can_be_named_with_config_and_column(hub: Hub) -> None:
    hub.publish("owner/name", {"README.md": CONFIGS, "small/only.jsonl": lines([{"question": "q", "answer": "a"}])})
    assert read("owner/name:small", column="answer") == ["a"]
    with pytest.raises(InputError, match=r"owner/name:small, row 1: no column 'x'; there are question, answer"):
        read("owner/name:small", column="x")


def test_a_dead_hub_is_noticed_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")

    class Silent:
        def head(self, url: str, timeout: float) -> None:
            time.sleep(60)

    monkeypatch.setattr("huggingface_hub.get_session", Silent)
    monkeypatch.setattr(engine_hub, "PROBE_SECONDS", 0.1)
    engine_hub.first_failure.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(HubUnreachable, match=r"tinystories: .* cannot be reached \(no answer in 0.1 s\)"):
        open_source("tinystories").documents("train")
    engine_hub.first_failure.cache_clear()
