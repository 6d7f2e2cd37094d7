"""What is prepared is what was read; however often it was interrupted, by however many processes."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import InputError
from engine.progress import Told, shown
from engine.tokenizer import Tokenizer, train_tokenizer
from train.data import shards
from train.data.loader import Cursor, PackedLoader
from train.data.shards import TokenShards, is_prepared, prepare
from train.data.sources import FileSource, open_source
from train.data.splits import Source
from train.data.stories import write_story

ROOT = Path(__file__).parents[3]
TEXTS = [" ".join(f"word{n * k % 97} ünd" for k in range(n % 23 + 1)) for n in range(400)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    return open_source(str(tmp_path / "texts.jsonl"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.workers.CHUNK_CHARACTERS", 2000)
    monkeypatch.setattr("train.data.workers.SMALL_CHARACTERS", 4000)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_document_comes_back_between_two_eods(tmp_path: Path, source: Source, tokenizer: Tokenizer) -> None:
    prepared = prepare(source, tokenizer, tmp_path / "out", "train", workers=1, shard_tokens=1000)
    texts = list(source.documents("train"))
    assert (prepared.documents, prepared.bytes) == (len(texts), sum(len(text.encode()) for text in texts))
    assert len(list((tmp_path / "out/train").glob("*.tokens"))) > 5
    for number, text in enumerate(texts):
        ids = [tokenizer.eod, *tokenizer.encode(text), tokenizer.eod]
        assert prepared.document(number).tolist() == ids
        assert prepared.lengths[number] == len(ids) - 1
        inputs, targets = prepared.read(number, 1, len(ids) - 2)
        assert (inputs.tolist(), targets.tolist()) == (ids[1:-1], ids[2:])
    assert prepared.tokens == prepared.lengths.sum()
    prepared.verify()


def test_shards_are_as_full_as_whole_documents_allow(tmp_path: Path, source: Source, tokenizer: Tokenizer) -> None:
    prepared = prepare(source, tokenizer, tmp_path / "out", "train", workers=1, shard_tokens=400)
    last = 0
    for shard in prepared.index["shards"]:
        last += shard["documents"]
        assert shard["tokens"] <= 400 or shard["documents"] == 1
        assert last == prepared.documents or shard["tokens"] + prepared.lengths[last] > 400


def test_the_number_of_workers_changes_nothing(tmp_path: Path, source: Source, tokenizer: Tokenizer) -> None:
    for workers in (1, 2):
        prepare(
            source, tokenizer, tmp_path / str(workers), "train", workers=workers, shard_tokens=1000, max_tokens=9000
        )
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_max_tokens_ends_with_the_document_that_reaches_it(
    tmp_path: Path, source: Source, tokenizer: Tokenizer
) -> None:
    prepared = prepare(source, tokenizer, tmp_path / "out", "train", workers=1, shard_tokens=1000, max_tokens=3333)
    assert prepared.tokens - prepared.lengths[-1] < 3333 <= prepared.tokens


def test_a_giant_document_gets_a_shard_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in ("a", "b", "long " * 50, "c")))
    prepared = prepare(open_source(str(tmp_path / "texts.jsonl")), tokenizer, tmp_path, "train", shard_tokens=20)
    assert [shard["documents"] for shard in prepared.index["shards"]] == [1, 1, 1]


class BrokenOffError(Exception):
    pass


class FailingSource(FileSource):
    """Breaks off after so many documents."""

    left = 10**9

    def documents(self, split: str, start: int = 0) -> Iterator[str]:
        for text in super().documents(split, start):
            if self.left == 0:
                raise BrokenOffError
            self.left -= 1
            yield text


@pytest.mark.parametrize("steps", [[1], [150], [60, 1, 200], [100] * 8])
def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path: Path, tokenizer: Tokenizer, steps: list[int]) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    source = FailingSource("texts", files=(tmp_path / "texts.jsonl",), root=tmp_path)
    prepare(source, tokenizer, tmp_path / "whole", "train", workers=1, shard_tokens=1000)
    for step in steps:
        source.left = step
        with contextlib.suppress(BrokenOffError):
            prepare(source, tokenizer, tmp_path / "broken", "train", workers=1, shard_tokens=1000)
    source.left = 10**9
    prepare(source, tokenizer, tmp_path / "broken", "train", workers=1, shard_tokens=1000)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


KILLED = """
import contextlib, os
from engine.progress import shown
from engine.tokenizer import Tokenizer
from train.data import workers
from train.data.shards import prepare
from train.data.sources import open_source
workers.CHUNK_CHARACTERS, workers.SMALL_CHARACTERS = 2000, 4000
@contextlib.contextmanager
def listen(what, total, unit):
    yield lambda tokens: tokens > 5000 and os._exit(9)
source, tokenizer = open_source("texts.jsonl"), Tokenizer.load("model")
with shown(listen):
    prepare(source, tokenizer, "out", "train", workers=2, shard_tokens=1000)
"""


def test_a_killed_run_takes_its_workers_along_and_goes_on_to_the_same_files(
    tmp_path: Path, source: Source, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tokenizer.save("model")
    # Workers hold the same pipes: the call returns only when they, too, are gone.
    killed = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, timeout=60)
    assert killed.returncode == 9, killed.stderr.decode()
    assert len(json.loads(Path("out/train/unfinished.json").read_text())["shards"]) >= 4
    assert not is_prepared("out")
    with pytest.raises(InputError, match="is not finished; run the command that prepared it again"):
        TokenShards("out", "train")
    prepare(open_source("texts.jsonl"), tokenizer, "out", "train", workers=1, shard_tokens=1000)
    prepare(open_source("texts.jsonl"), tokenizer, "whole", "train", workers=1, shard_tokens=1000)
    assert content(Path("out")) == content(Path("whole"))


def test_progress_counts_to_the_end(tmp_path: Path, source: Source, tokenizer: Tokenizer) -> None:
    told: list[Any] = []

    @contextlib.contextmanager
    def listen(*task: Any) -> Iterator[Told]:
        told.append(task)
        yield told.append

    with shown(listen):
        prepared = prepare(source, tokenizer, tmp_path, "train", workers=1, max_tokens=3000)
    (task, *counts) = told
    assert task == ("tokenizing train", 3000, "tokens")
    assert counts == sorted(counts) and counts[-1] == prepared.tokens


def test_what_is_prepared_is_opened_and_not_made_again(tmp_path: Path, source: Source, tokenizer: Tokenizer) -> None:
    first = prepare(source, tokenizer, tmp_path / "out", "train", workers=1)
    before = (tmp_path / "out/train/00000.tokens").stat().st_mtime_ns
    again = prepare(source, tokenizer, tmp_path / "out", "train", workers=1)
    assert (tmp_path / "out/train/00000.tokens").stat().st_mtime_ns == before
    assert first.fingerprint == again.fingerprint
    assert is_prepared(tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out").fingerprint == tokenizer.fingerprint
    assert not is_prepared(tmp_path)


def test_other_settings_are_refused_by_name(tmp_path: Path, source: Source, tokenizer: Tokenizer) -> None:
    prepare(source, tokenizer, tmp_path / "out", "train", workers=1)
    with pytest.raises(InputError, match="made with another max_tokens; delete it or choose another folder"):
        prepare(source, tokenizer, tmp_path / "out", "train", workers=1, max_tokens=5)
    with pytest.raises(InputError, match="made with another source_fingerprint"):
        prepare(open_source(source.name, limit=9), tokenizer, tmp_path / "out", "train", workers=1)
    other = train_tokenizer(TEXTS[:50], 280)
    with pytest.raises(InputError, match="made with another tokenizer_fingerprint"):
        prepare(source, other, tmp_path / "out", "train", workers=1)
    with pytest.raises(InputError, match=r"tokenizer.model is another tokenizer"):
        prepare(source, other, tmp_path / "out", "validation", workers=1)


def test_a_damaged_folder_is_refused_by_name(tmp_path: Path, source: Source, tokenizer: Tokenizer) -> None:
    prepare(source, tokenizer, tmp_path / "good", "train", workers=1, shard_tokens=1000)

    def damaged(file: str, change: bytes | None) -> Path:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        if change is None:
            (folder / "train" / file).unlink()
        else:
            (folder / "train" / file).write_bytes(change)
        return folder

    tokens = (tmp_path / "good/train/00001.tokens").read_bytes()
    with pytest.raises(InputError, match=r"00001.tokens is damaged: .* bytes long where the index says .*; delete"):
        TokenShards(damaged("00001.tokens", tokens[:-7]), "train")
    with pytest.raises(InputError, match=r"00001.starts is missing; delete"):
        TokenShards(damaged("00001.starts", None), "train")
    changed = TokenShards(damaged("00001.tokens", bytes([tokens[0] ^ 1]) + tokens[1:]), "train")
    with pytest.raises(InputError, match=r"00001.tokens is damaged: its SHA-256"):
        changed.verify()
    with pytest.raises(InputError, match=r"index.json is damaged"):
        TokenShards(damaged("index.json", b'{"format": 1, "sha'), "train")
    with pytest.raises(InputError, match=r"has format 2; this version reads 1; delete .*train and prepare"):
        TokenShards(damaged("index.json", b'{"format": 2, "shards": []}'), "train")
    with pytest.raises(InputError, match=r"made with another tokenizer"):
        TokenShards(tmp_path / "good", "train", "0" * 64)
    with pytest.raises(InputError, match=r"validation holds no prepared data; make it with `gpt data prepare`"):
        TokenShards(tmp_path / "good", "validation", tokenizer.fingerprint)


@pytest.mark.parametrize("value", [None, -1, 0, 3.5, 10**30, "", "x", [], [1], {}, {"a": 1}, True])
def test_an_index_of_another_kind_is_refused_with_its_place(
    tmp_path: Path, source: Source, tokenizer: Tokenizer, value: object
) -> None:
    prepare(source, tokenizer, tmp_path, "train", workers=1)
    index = json.loads((tmp_path / "train" / "index.json").read_text())
    (tmp_path / "train" / "index.json").write_text(json.dumps(index | {"vocab_size": value}))
    with pytest.raises(InputError, match=r"index.json is damaged: its sha256 is not that of its content; delete"):
        TokenShards(tmp_path, "train")
    # An older version wrote none.
    del index["sha256"]
    shard = index["shards"][0]
    kept = [("max_tokens", None), ("max_tokens", -1), ("max_tokens", 0), ("max_tokens", 10**30), ("source", "x")]
    kept += [
        ("source", ""),
        ("commit", ""),
        ("commit", "x"),
        ("shard_tokens", 0),
        ("shard_tokens", -1),
        ("shard_tokens", 10**30),
    ]
    for name in index:
        if (name, value) in kept and type(value) is not bool:
            continue
        if type(value) is type(index[name]) and name not in ("dtype", "shards", "format"):
            continue
        (tmp_path / "train" / "index.json").write_text(json.dumps(index | {name: value}))
        with pytest.raises(InputError, match=rf"index.json .*({name}|shards).*; delete .*train and prepare"):
            TokenShards(tmp_path, "train")
    for name in ("documents", "tokens"):
        (tmp_path / "train" / "index.json").write_text(json.dumps(index | {"shards": [shard | {name: value}]}))
        with pytest.raises(
            InputError, match=r"index.json is damaged: shards.0|0.(tokens|starts) is damaged: .* bytes long"
        ):
            TokenShards(tmp_path, "train")


def test_damage_is_seen_before_training_and_while_it_reads(
    tmp_path: Path, source: Source, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(source, tokenizer, tmp_path / "good", "train", workers=1, shard_tokens=10_000)

    def damaged(kind: str, place: int, value: int) -> TokenShards:
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / "out", dirs_exist_ok=True)) / "train"
        numbers = np.fromfile(folder / f"00001.{kind}", "<i8" if kind == "starts" else "<u2")
        numbers[place] = value
        numbers.tofile(folder / f"00001.{kind}")
        return TokenShards(tmp_path / "out", "train")

    damaged("tokens", 0, tokenizer.eod).check(tokenizer.eod)
    with pytest.raises(InputError, match=r"00001.tokens is damaged: its SHA-256"):
        damaged("tokens", 5, tokenizer.eod).check(tokenizer.eod)
    unknown = damaged("tokens", 1, 300)
    first = int(unknown.first[1])
    for read in (lambda: unknown.document(first), lambda: unknown.read(first, 1, 1)):
        with pytest.raises(InputError, match=r"00001.tokens is damaged: document 1 .* token 300, beyond .* of 292"):
            read()
    unknown.read(first + 1, 0, 1)
    # Of more than can be read in a moment, some documents.
    monkeypatch.setattr(shards, "SMALL_BYTES", 0)
    damaged("tokens", 0, tokenizer.eod).check(tokenizer.eod)
    with pytest.raises(InputError, match=r"00001.tokens is damaged: document 1 .* token 300"):
        damaged("tokens", 1, 300).check(tokenizer.eod)
    with pytest.raises(InputError, match=r"00001.tokens is damaged: document 1 .* not stand between two ends"):
        damaged("tokens", 0, tokenizer.eod + 7).check(tokenizer.eod)
    for place, value in ((0, 1), (2, 0), (-1, 20_000)):
        with pytest.raises(InputError, match=r"00001.starts is damaged: its places do not rise from 0 to"):
            assert damaged("starts", place, value).lengths
    for value in (-1, 10**9):
        with pytest.raises(InputError, match=r"00001.starts is damaged: document 1 of it has no end"):
            damaged("starts", 1, value).document(first)


def test_a_full_disk_says_how_to_go_on(
    tmp_path: Path, source: Source, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"No space left on device; .* are free on its disk: make room there"):
        prepare(source, tokenizer, tmp_path / "out", "train", workers=1)


FAILING = """
import os
from pathlib import Path
from typing import Any
from engine.errors import InputError
from engine.progress import Told, shown
from engine.tokenizer import SentencePieceTokenizer
from train.data import workers
from train.data.shards import prepare
from train.data.sources import open_source
workers.CHUNK_CHARACTERS, workers.SMALL_CHARACTERS = 2000, 4000
class Failing(SentencePieceTokenizer):
    def encode_batch(self, texts):
        if Path("bad").read_text() in texts:
            FAIL
        return super().encode_batch(texts)
if __name__ == "__main__":
    tokenizer = Failing(Path("model").read_bytes())
    try:
        prepare(open_source("texts.jsonl"), tokenizer, "out", "train", workers=2, shard_tokens=1000)
    except InputError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("os._exit(9)", r"a tokenizing process died at one of the documents (\d+) to (\d+), .*run again with fewer"),
        ("raise MemoryError", r"one of the documents (\d+) to (\d+) cannot be tokenized: MemoryError"),
    ],
)
def test_a_worker_that_fails_names_its_documents(
    tmp_path: Path, source: Source, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, failure: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tokenizer.save("model")
    Path("bad").write_text(list(source.documents("train"))[200])
    Path("failing.py").write_text(FAILING.replace("FAIL\n", failure + "\n"))
    failed = subprocess.run([sys.executable, "failing.py"], capture_output=True, text=True, timeout=60)
    found = re.match(message, failed.stdout)
    assert found and int(found[1]) <= 201 <= int(found[2]) < int(found[1]) + 16, failed.stdout + failed.stderr


def test_stories_are_written_by_the_workers_and_are_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = open_source("stories", limit=90)
    for workers in (1, 2):
        prepared = prepare(
            source, tokenizer, tmp_path / str(workers), "train", workers=workers, shard_tokens=2000, max_tokens=9000
        )
    assert content(tmp_path / "1") == content(tmp_path / "2")
    last = prepared.documents - 1
    assert tokenizer.decode(prepared.document(last).tolist()) == write_story(last).text


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux says which files are open")
def test_no_more_files_are_open_than_are_being_read(
    tmp_path: Path, source: Source, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(open_source(source.name, limit=60), tokenizer, tmp_path, "train", workers=1, shard_tokens=20)
    monkeypatch.setattr(shards, "MAPPED_FILES", 6)

    def opened() -> int:
        return sum(str(tmp_path) in str(link.resolve()) for link in Path("/proc/self/fd").iterdir())

    prepared = TokenShards(tmp_path, "train")
    assert len(prepared.index["shards"]) > 50 and opened() == 0
    read = [prepared.read(document, 0, 1) for document in range(prepared.documents)]
    assert opened() <= 6
    assert all(inputs[0] == tokenizer.eod for inputs, _ in read)


def test_positions_beyond_32_bits_are_read_right(tmp_path: Path) -> None:
    length, count = 4 * 10**10 + 11, 3
    place = tmp_path / "train"
    place.mkdir()
    with (place / "00000.tokens").open("wb") as file:
        for document in range(count + 1):
            file.seek(2 * document * length)
            file.write(np.array([7 + document], "<u2").tobytes())
    (np.arange(count + 1, dtype="<i8") * length).tofile(place / "00000.starts")
    entry = {"documents": count, "tokens": count * length, "bytes": 1, "sha256": {}}
    index = {"format": 1, "dtype": "<u2", "vocab_size": 300, "tokenizer_fingerprint": "", "shards": [entry]}
    (place / "index.json").write_text(json.dumps(index))
    prepared = TokenShards(tmp_path, "train")
    assert prepared.lengths.tolist() == [length] * count
    assert [int(prepared.read(document, 0, 1)[0][0]) for document in range(count)] == [7, 8, 9]
    assert int(prepared.read(2, length - 1, 1)[1][0]) == 10
    # The batches at the two ends of the epoch, and where they say that they stand.
    loader = PackedLoader(prepared, 1024, 512, seed=0, shuffle=False, prefetch=0)
    pieces = count * -(-length // 512)
    assert next(loader).tokens[0] == 7 and loader.tokens_per_epoch == count * length > 10**11
    loader.load_state_dict(loader.state_dict() | {"position": pieces - 1, "tokens": count * length - length % 512})
    batch = next(loader)
    assert batch.targets[length % 512 - 1] == 10 and batch.tokens[length % 512] == 7
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 1)
    # A shuffled epoch deals pieces from everywhere.
    shuffled = PackedLoader(prepared, 1024, 512, seed=0, prefetch=0)
    places = [
        (document * length + start) for _, _, _, (document, start, _) in islice(shuffled.segments(Cursor()), 1000)
    ]
    assert min(places) < 10**9 and max(places) > 119 * 10**9
