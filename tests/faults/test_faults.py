"""A small part of `make faults` as ordinary tests; and that it covers what is there, and repeats what it finds."""

import contextlib
import importlib
import random
from pathlib import Path

import pytest

from cli.server import openai
from engine.tokenizer import Tokenizer
from tests.faults import api, damage, odd_files, options, parsers
from tests.faults.__main__ import PARTS, Row, load, show
from tests.faults.board import Board, changes, contents
from tests.faults.child import Done, modules


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board("options", 7, tmp_path / "scratch", tmp_path / "world")


def test_every_module_can_be_imported_before_anything_is_forked() -> None:
    for name in modules():
        importlib.import_module(name)


# Those that write a file for every example take longer.
QUICK = parsers.PARSERS.keys() - {"JSON lines", "bytes as data", "measured rates", "metrics.jsonl"}


@pytest.mark.parametrize("name", sorted(QUICK))
def test_no_parser_raises_anything_but_a_sentence(
    name: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer.save("tokenizer.model")
    parsers.examples(name, 0, 10)


def test_no_request_made_from_the_schema_breaks_its_parser() -> None:
    answers = {True: 0, False: 0}
    for _, path, sent, _ in api.requests(random.Random(0), 200):
        with contextlib.suppress(openai.APIError):
            openai.parse(api.PATHS.get(path, api.ChatRequest), sent)
            answers[True] += 1
            continue
        answers[False] += 1
    assert min(answers.values()) > 20


def test_every_command_and_every_option_is_tried() -> None:
    names = {" ".join(path) for path, _ in options.commands()}
    assert names == options.LINES.keys()
    plans = [*options.plans(0)]
    tried = {name for _, _, name in plans}
    assert {"--gpus", "--vocab-size", "--cors", "model.width"} <= tried and len(plans) > 2000
    assert plans == [*options.plans(0)] and plans != [*options.plans(1)]
    lines = {tuple(words) for _, words, _ in plans}
    assert ("settings", "x" * 300) in lines
    assert any(words[:3] == ("train", "nano", "--data") and words[-2:] == ("--gpus", "0") for words in lines)


def test_every_part_can_be_loaded_and_every_odd_file_be_made(tmp_path: Path) -> None:
    assert all(callable(load(part)[1]) for part in PARTS)
    assert len(odd_files.write(tmp_path / "odd")) > 70


def test_damage_changes_a_file_and_repeats(tmp_path: Path) -> None:
    content = b'{"a": [1, 2, {"b": 3}], "c": "text", "d": 4.5}'
    for how in (*damage.BYTES, damage.changed_json):
        drawn = [how(content, random.Random(number)) for number in range(20)]
        assert drawn == [how(content, random.Random(number)) for number in range(20)]
        assert len({*drawn}) > 2 and any(each != content for each in drawn), how
    assert sum(a != b for a, b in zip(damage.flip(content, random.Random(0)), content, strict=True)) == 1


@pytest.mark.parametrize(
    ("done", "kinds"),
    [
        (Done(0, "", "", 1.0), []),
        (Done(2, "", "error: words.txt: no such file", 1.0), []),
        (Done(2, "", "no", 1.0), ["unnamed"]),
        (Done(1, "", "Traceback (most recent call last):\nValueError: x", 1.0), ["traceback"]),
        (Done(1, "", "error: a bug of gpt, not of yours: ValueError", 1.0), ["traceback"]),
        (Done(-11, "", "", 1.0), ["traceback"]),
        (Done(-9, "", "", 1.0, hung=True), ["hang"]),
        (Done(0, "", "", 1.0, left=2), ["left behind"]),
    ],
)
def test_what_came_of_a_command_is_judged(board: Board, done: Done, kinds: list[str]) -> None:
    (case,) = (case for case in board.cases(1))
    case.judge(done, ("words.txt",))
    assert [failure.kind for failure in board.failures] == kinds


def test_a_case_alone_is_the_case_among_all(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    among = [(case.number, case.random.random()) for case in board.cases(50)]
    halves = [Board("options", 7, board.scratch, board.world, worker=worker, workers=2) for worker in (0, 1)]
    assert sorted((case.number, case.random.random()) for half in halves for case in half.cases(50)) == among
    alone = Board("options", 7, board.scratch, board.world, only=31)
    for case in alone.cases(50):
        assert (case.number, case.random.random()) == among[31]
        case.what = "gpt info nowhere"
        case.fail("hang", "nothing")
    assert alone.tried == 1
    show({"options": Row("options", 1, 2.0, failures=alone.failures)}, 7)
    assert "python -m tests.faults --only options --seed 7 --case 31" in capsys.readouterr().out


def test_a_changed_file_and_a_new_folder_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = contents(tmp_path)
    (tmp_path / "a").write_text("2")
    (tmp_path / "b").mkdir()
    assert changes(before, contents(tmp_path)) == ["a", "b"]
