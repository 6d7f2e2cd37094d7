"""Our own JSON files: how they are written and read, and what is said of one that is damaged.

`dumps` seals what it writes with a checksum of the content, so that no change of it goes unnoticed. Files of older
versions have no seal; what they hold is compared with a schema all the same.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import InputError

SEAL = "sha256"
# What nests deeper cannot even be printed everywhere. No number of ours is longer, and this long it still is a float.
MOST_LEVELS, MOST_DIGITS = 100, 300

Kind = TypeVar("Kind")


class DamagedFileError(InputError):
    """A file of ours is not as it was written. The message says where, what was expected, and what to do."""


def dumps(content: Mapping[str, Any]) -> str:
    """Return the JSON text of a file of ours, sealed."""
    # It is sealed as it will be read back: JSON knows no tuples, and its names are texts.
    plain = json.loads(json.dumps(dict(content)))
    return json.dumps({**plain, SEAL: _digest(plain)}, indent=1)


def read(path: Path, kind: type[Kind], advice: str = "", formats: Mapping[int, bool] | None = None) -> Kind:
    """Return what a file of ours holds, as `kind`: a dataclass, or a list or dict of plain types.

    `formats` are the values of "format" that this version reads, and whether a file of each must be sealed. Raises
    DamagedFileError, which ends with `advice`; InputError for another format; OSError where there is no such file.
    """

    advice = f"; {advice}" if advice else ""

    def damage(what: str) -> DamagedFileError:
        return DamagedFileError(f"{path} is damaged: {what}{advice}")

    try:
        content = parse(path.read_bytes().decode())
    except json.JSONDecodeError as error:
        raise damage(f"line {error.lineno} is no JSON ({error.msg})") from None
    except ValueError as error:
        raise damage(str(error)) from None
    seal = content.pop(SEAL, None) if isinstance(content, dict) else None
    if seal is not None and seal != _digest(content):
        raise damage(f"its {SEAL} is not that of its content")
    found = content.get("format") if formats and isinstance(content, dict) else None
    if formats and type(found) is int:
        if found not in formats:
            readable = " and ".join(map(str, formats))
            raise InputError(f"{path} has format {found}; this version reads {readable}{advice}")
        if formats[found] and seal is None:
            raise damage(f"its {SEAL} is missing")
    return conform(content, kind, damage)


def parse(text: str, **options: Any) -> Any:
    """Return the value of a JSON text, as json.loads with these options. Raises ValueError for what json.loads takes:

    a name that comes twice in one object, values that are nested too deeply, and, without `parse_int`, an integer that
    is too long.
    """
    try:
        value = json.loads(text, **{"parse_int": _integer, "object_pairs_hook": _object} | options)
        deep = text.count("[") + text.count("{") > MOST_LEVELS and _levels(value) > MOST_LEVELS
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"its values are nested more than {MOST_LEVELS} levels deep")
    return value


def conform(content: Any, kind: type[Kind], damage: Callable[[str], Exception]) -> Kind:
    """Return the content as `kind`. Raises what `damage` makes of the first difference: its place, and what it is."""
    # Imported where a file is read: it takes a tenth of a second.
    from pydantic import ValidationError

    try:
        # Where dataclasses are strict, they read objects from JSON text alone.
        checked: Kind = _schema(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place, found = ".".join(map(str, first["loc"])) or "it", json.dumps(first["input"])[:40]
        what = "is missing" if first["type"] == "missing" else f"{first['msg'].removeprefix('Input ')}, not {found}"
        raise damage(f"{place} {what}") from None
    return checked


def _make_schema(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


_schema: Callable[[Any], Any] = cache(_make_schema)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _levels(value: Any) -> int:
    level, count = [value], 0
    while level := [inner for each in level if isinstance(each, dict | list) for inner in _inside(each)]:
        count += 1
    return count


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it holds an integer of {len(digits):,} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name[:40]!r} is named twice in one object")
    return found
