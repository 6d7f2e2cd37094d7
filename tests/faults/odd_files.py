"""Odd files for every command that reads data: ragged, cut short, nested, mislabelled, empty, and what people have."""

import gzip
import json
import random
from pathlib import Path

from tests.faults import child, world
from tests.faults.board import Board, changes, contents

TEXT = "The fox sat down, tired and cold, and slept."
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
COMMANDS = [
    "data show {}",
    "data prepare {} --out new --vocab-size 300 --workers 1",
    "tokenizer train --data {} --out new.model --vocab-size 300",
    f"train nano --data {{}} --out new --steps 1 {world.SMALL} --set model.vocab_size=320",
    f"train nano --data {{}} --out new --steps 1 --stream {world.SMALL} --set data.tokenizer=tokenizer.model",
    f"finetune base --data {{}} --out new --steps 1 {world.TUNE}",
    f"reward chat --data {{}} --out new --steps 1 {world.TUNE}",
    f"rlhf dpo chat --data {{}} --out new --steps 1 {world.TUNE}",
    "rlhf pairs chat --data {} --prompts 2 --judge reward --device cpu --precision fp32",
    "evaluate base --data {} --count 1 --tokens 50 --device cpu --precision fp32",
    "tokenizer show {}",
    "import {} --out new",
]


def rows(*values: object, times: int = 40) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values * times)


def nested(depth: int, *, kind: str = "[") -> bytes:
    begin, end = ("[", "]") if kind == "[" else ('{"text":', "}")
    return (begin * depth + "1" + end * depth).encode()


def files() -> dict[str, bytes]:
    """Return every odd file by its name."""
    good = rows({"text": TEXT})
    found: dict[str, bytes] = {
        **{f"empty.{ending}": b"" for ending in ("txt", "jsonl", "json", "csv", "parquet", "gz", "model")},
        **{f"blank.{ending}": b" \n\n\t\n" for ending in ("txt", "jsonl", "json", "csv")},
        **{f"nul.{ending}": b"\0" * 4096 for ending in ("txt", "jsonl", "json", "csv", "parquet", "model")},
        **{f"random.{ending}": random.Random(1).randbytes(4096) for ending in ("txt", "jsonl", "csv", "parquet", "gz")},
        **{f"json-as.{ending}": good for ending in ("csv", "parquet", "json", "txt", "gz", "model")},
        "text-as.jsonl": TEXT.encode() * 10,
        "text-as.parquet": TEXT.encode() * 10,
        "latin1.txt": "caf\u00e9 ".encode("latin-1") * 500,
        "utf16.jsonl": good.decode().encode("utf-16"),
        "bom.jsonl": b"\xef\xbb\xbf" + good,
        "nul-inside.txt": (TEXT + "\0" + TEXT).encode() * 40,
        "no-newline.jsonl": good[:-1],
        "cut.jsonl": good[:-7],
        "crlf.jsonl": good.replace(b"\n", b"\r\n"),
        "one-huge-line.txt": TEXT.encode() * 20_000,
        "short.txt": b"a",
        "two-words.txt": b"a b",
        "ragged.csv": b"id,text\n" + b"".join(b"%d,%s\n" % (n, TEXT.encode() if n == 7 else b"ran") for n in range(40)),
        "twice.csv": b"text,text\n" + b"a fox,an owl\n" * 40,
        "no-header.csv": f'"{TEXT}"\n'.encode() * 40,
        "quote-open.csv": b'id,text\n1,"' + TEXT.encode() * 40,
        "semicolon.csv": b"id;text\n" + b"1;The fox ran.\n" * 40,
        "tab.csv": b"id\ttext\n" + b"1\tThe fox ran.\n" * 40,
        "huge-field.csv": b"text\n" + b'"' + TEXT.encode() * 20_000 + b'"\n',
        "deep-list.jsonl": good + nested(20_000) + b"\n",
        "deep-object.jsonl": good + nested(20_000, kind="{") + b"\n",
        "deep.json": nested(20_000),
        "deep-field.jsonl": good + b'{"text": "a", "x": ' + nested(900) + b"}\n",
        "long-number.jsonl": good + b'{"text": "a", "id": ' + b"7" * 5000 + b"}\n",
        "long-float.jsonl": good + b'{"text": "a", "id": 1e' + b"9" * 400 + b"}\n",
        "nan.jsonl": good + b'{"text": "a", "id": NaN}\n',
        "surrogate.jsonl": good + b'{"text": "\\ud800"}\n',
        "key-twice.jsonl": b'{"text": "a fox", "text": "an owl"}\n' * 40,
        "list.json": json.dumps([{"text": TEXT}] * 40).encode(),
        "object.json": json.dumps({"text": TEXT}).encode(),
        "number.json": b"1",
        "mixed.jsonl": rows({"text": TEXT}, [1], "x", None, 3),
        "null-text.jsonl": rows({"text": None}),
        "number-text.jsonl": rows({"text": 3}),
        "no-text.jsonl": rows({"id": 3}),
        "nested-text.jsonl": rows({"text": {"text": TEXT}}),
        "many-columns.jsonl": rows({f"c{n}": TEXT for n in range(200)}),
        "chat.jsonl": rows(CHAT),
        "chat-no-content.jsonl": rows({"messages": [{"role": "user"}, {"role": "assistant", "content": "Hello"}]}),
        "chat-role.jsonl": rows({"messages": [{"role": "wizard", "content": "Hi"}, CHAT["messages"][1]]}),
        "chat-empty.jsonl": rows({"messages": []}),
        "chat-text.jsonl": rows({"messages": "Hi"}),
        "chat-answer-first.jsonl": rows({"messages": CHAT["messages"][::-1]}),
        "chat-special.jsonl": rows(
            {"messages": [{"role": "user", "content": "<|end|><|assistant|>"}, CHAT["messages"][1]]}
        ),
        "chat-long.jsonl": rows({"messages": [{"role": "user", "content": TEXT * 50}, CHAT["messages"][1]]}),
        "chat-parts.jsonl": rows({"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT["messages"][1]]}),
        "answer-null.jsonl": rows({"prompt": "Hi", "response": None}),
        "answer-list.jsonl": rows({"prompt": "Hi", "response": ["Hello"]}),
        "pairs.jsonl": rows(PAIR),
        "pairs-same.jsonl": rows({**PAIR, "rejected": "Hello"}),
        "pairs-empty.jsonl": rows({**PAIR, "chosen": ""}),
        "pairs-number.jsonl": rows({**PAIR, "chosen": 1}),
        "pairs-prompts-differ.jsonl": rows(
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}
        ),
        "good.txt.gz": gzip.compress(TEXT.encode() * 40),
        "cut.txt.gz": gzip.compress(random.Random(1).randbytes(4000))[:-100],
        "cut.parquet": b"PAR1" + b"\0" * 100,
    }
    return found


def write(folder: Path) -> list[str]:
    """Write all odd files, and odd things that are no files, into a folder. Return their names."""
    folder.mkdir()
    found = files()
    for name, content in found.items():
        (folder / name).write_bytes(content)
    for name in ("line\nbreak.jsonl", "-dash.jsonl", "star*.jsonl"):
        (folder / name).write_bytes(rows({"text": TEXT}))
    for name in ("folder.jsonl", "in-folder"):
        (folder / name).mkdir()
    (folder / "in-folder" / "a.txt").write_text(TEXT)
    (folder / "in-folder" / "b.jsonl").write_text("{")
    (folder / "dangling.txt").symlink_to("nowhere")
    (folder / "loop.txt").symlink_to("loop.txt")
    return sorted(path.name for path in folder.iterdir())


def run(board: Board) -> None:
    names = write(board.scratch / f"odd-{board.worker}")
    plans = [(name, command) for name in names for command in COMMANDS]
    for case in board.cases(len(plans)):
        name, command = plans[case.number]
        with child.copied(board.world, case.folder / "w") as here:
            write(here / "odd")
            words = [word.format(f"odd/{name}") if word == "{}" else word for word in command.split()]
            case.what = f"gpt {' '.join(words)}"
            before = contents(here)
            done = child.run(child.gpt(*words), here, 30)
            case.judge(done, (name.split("\n")[0], repr(name)[1:-1]))
            if done.stopped:
                case.fail("hang", f"still at work after 30 s: {done.said}")
            if done.code == 2 and (left := changes(before, contents(here))):
                case.fail("left behind", f"{', '.join(left[:5])}: {done.said}")
