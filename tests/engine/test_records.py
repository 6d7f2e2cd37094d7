"""Our own JSON files: sealed, compared with a schema, and one message where one is damaged."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine import records
from engine.errors import InputError


@dataclass(frozen=True)
class Part:
    size: int


@dataclass(frozen=True)
class Whole:
    format: int
    name: str
    parts: dict[str, Part]
    note: str | None = None


CONTENT = {"format": 2, "name": "\u00fc", "parts": {"a": {"size": 3}}}
FORMATS = {1: False, 2: True}


def read(path: Path) -> Whole:
    return records.read(path, Whole, "bring it back", FORMATS)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    path.write_text(records.dumps(CONTENT))
    assert read(path) == Whole(2, "\u00fc", {"a": Part(3)})
    path.write_text(json.dumps(CONTENT | {"format": 1, "unknown": 1}))
    assert read(path).format == 1
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.json")


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    original = records.dumps(CONTENT).encode()
    for place in range(len(original)):
        path.write_bytes(original[:place] + bytes([original[place] ^ 1 << place % 8]) + original[place + 1 :])
        try:
            assert read(path) == Whole(2, "\u00fc", {"a": Part(3)})
        except InputError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "line 1 is no JSON"),
        ('{\n"format": 1,\n', "line 3 is no JSON"),
        ("\ufeff{}", "no JSON"),
        ("[]", "it should be an object, not []"),
        ("3", "it should be an object, not 3"),
        ('{"format": 1}', "name is missing"),
        ('{"format": "1"}', 'format should be a valid integer, not "1"'),
        (json.dumps(CONTENT | {"format": 1, "name": None}), "name should be a valid string, not null"),
        (json.dumps(CONTENT | {"format": 1, "parts": {"a": {"size": 2.5}}}), "parts.a.size should be a valid integer"),
        (json.dumps(CONTENT | {"format": 1, "parts": {"a": {"size": True}}}), "parts.a.size should be a valid integer"),
        (json.dumps(CONTENT), "its sha256 is missing"),
        (json.dumps(CONTENT | {"sha256": None}), "its sha256 is missing"),
        (json.dumps(CONTENT | {"sha256": "0"}), "its sha256 is not that of its content"),
        ('{"name": ' + "[" * 5000 + "]" * 5000 + "}", "nested more than 100 levels deep"),
        ('{"name": ' + "[" * 101 + "]" * 101 + "}", "nested more than 100 levels deep"),
        ('{"format": ' + "1" * 5000 + "}", "an integer of 5,000 digits"),
        ('{"format": 1, "format": 1}', "'format' is named twice"),
        ('{"format": 1, "name": "\\ud800", "parts": {}}', "it "),
    ],
)
def test_damage_is_named_with_its_place(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    path.write_text(text)
    with pytest.raises(records.DamagedFileError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged: ") and what in message and message.endswith("; bring it back")
    assert len(message) < len(str(path)) + 200


def test_another_format_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    path.write_text(records.dumps(CONTENT | {"format": 3}))
    with pytest.raises(InputError, match="has format 3; this version reads 1 and 2; bring it back") as caught:
        read(path)
    assert not isinstance(caught.value, records.DamagedFileError)


@pytest.mark.parametrize("value", [{"a": float("nan"), "b": float("inf")}, {}, {"a": 1e-5, "b": 1e22, "c": -0.0}])
def test_numbers_are_sealed_as_they_are_read(value: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text(records.dumps(value))
    assert str(records.read(path, dict[str, float])) == str(value)
