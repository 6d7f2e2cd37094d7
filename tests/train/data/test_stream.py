"""A stream gives every document once, to one rank, and the same batches again from any cursor."""

import json
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import InputError
from engine.processes import Processes
from engine.tokenizer import Tokenizer, train_tokenizer
from tests.train.data.hub import Hub, parquet_file
from train.data import sources, stream
from train.data.loader import Batch, PackedLoader
from train.data.shards import prepare
from train.data.sources import open_source
from train.data.splits import Source
from train.data.stories import Story, write_story
from train.data.stream import StreamLoader

TEXTS = [f"document {n} " + " ".join(f"word{n * k % 97}" for k in range(n % 23)) for n in range(130)]
Loader = Callable[..., StreamLoader]


class Unconnected(Processes):
    """One of several processes, for each of which the others are as far as it is itself."""

    def collect(self, value: Any) -> list[Any]:
        return [value] * self.count


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK_DOCUMENTS", 7)


@pytest.fixture(params=["files", "hub, a file for every rank", "hub, one file", "hub, limited"])
def source(request: pytest.FixtureRequest, tmp_path: Path, hub: Hub) -> Source:
    """The texts, and an empty one in every file, as so many parquet files: what a set of the hub consists of."""
    count = 4 if request.param == "hub, a file for every rank" else 1
    rows = [[{"text": text} for text in [*TEXTS[number::count], ""]] for number in range(count)]
    files = {f"{number}.parquet": parquet_file(each) for number, each in enumerate(rows)}
    if request.param == "files":
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        return open_source(str(tmp_path))
    hub.publish("owner/name", files)
    return open_source("owner/name", limit=100 if request.param == "hub, limited" else None)


@pytest.fixture
def loader(source: Source, tokenizer: Tokenizer, tmp_path: Path) -> Loader:
    held_out = prepare(source, tokenizer, tmp_path / "out", "validation")

    def make(rank: int = 0, world_size: int = 1, prefetch: int = 0) -> StreamLoader:
        team = Unconnected(rank, world_size)
        return StreamLoader(source, tokenizer, held_out, 48 * world_size, 16, processes=team, prefetch=prefetch)

    return make


def equal(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, key), getattr(right, key)) for key in ("tokens", "targets", "cu_seqlens"))


def first_pass(loader: StreamLoader, tokenizer: Tokenizer) -> list[str]:
    """The documents of one pass over the data: up to where the first one comes again."""
    documents: list[list[int]] = []
    while loader.epoch < 2:
        for token in next(loader).tokens.tolist():
            if token == tokenizer.eod:
                documents.append([])
            else:
                documents[-1].append(token)
    return [tokenizer.decode(ids) for ids in documents[: documents.index(documents[0], 1)]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_read_every_document_once(
    loader: Loader, source: Source, tokenizer: Tokenizer, world_size: int
) -> None:
    read = [first_pass(loader(rank=rank, world_size=world_size), tokenizer) for rank in range(world_size)]
    assert min(map(len, read)) > 0
    assert sorted(chain.from_iterable(read)) == sorted(source.documents("train"))


def test_a_lone_rank_gets_the_batches_of_prepared_data_unshuffled(
    loader: Loader, source: Source, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepared = PackedLoader(prepare(source, tokenizer, tmp_path / "out", "train"), 48, 16, seed=0, shuffle=False)
    assert all(map(equal, islice(loader(), 100), islice(prepared, 100)))


@pytest.mark.parametrize(("world_size", "stop", "prefetch"), [(1, 0, 0), (1, 9, 2), (2, 1, 0), (2, 23, 2), (2, 60, 0)])
def test_a_resumed_stream_gives_the_same_batches(loader: Loader, world_size: int, stop: int, prefetch: int) -> None:
    first = loader(world_size - 1, world_size, prefetch)
    list(islice(first, stop))
    state = json.loads(json.dumps(first.state_dict()))
    expected = list(islice(first, 40))
    first.close()
    second = loader(world_size - 1, world_size, prefetch)
    second.load_state_dict(state)
    assert all(map(equal, islice(second, 40), expected))
    after = second.state_dict()["places"][world_size - 1]
    assert (after["batches"], after["tokens"]) == (stop + 40, 48 * (stop + 40))
    second.close()


def test_another_number_of_ranks_or_other_data_is_refused(loader: Loader) -> None:
    state = loader().state_dict()
    with pytest.raises(InputError, match="cannot be resumed with another number of processes: it was 1, now it is 2"):
        loader(world_size=2).load_state_dict(state)
    with pytest.raises(InputError, match="cannot be resumed with another data: it was"):
        loader().load_state_dict(state | {"data": "other"})


def test_more_ranks_than_documents_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('"one"\n"two"\n')
    source = open_source(str(tmp_path / "a.jsonl"))
    held_out = prepare(source, tokenizer, tmp_path / "out", "validation")
    with pytest.raises(InputError, match="no text to train on for process 3 of 3; give more data"):
        next(StreamLoader(source, tokenizer, held_out, 48, 16, processes=Unconnected(2, 3)))
    with pytest.raises(InputError, match="a stream's 48 tokens do not divide among 5 processes"):
        StreamLoader(source, tokenizer, held_out, 48, 16, processes=Unconnected(0, 5))


def test_stories_are_streamed_without_writing_those_of_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def write(number: int, split: str) -> Story:
        written.append(number)
        return write_story(number, split)

    monkeypatch.setattr(sources, "write_story", write)
    share = open_source("stories").share(1, 3, {"read": 2}, 2)
    assert next(share) == ({"read": 2}, [write_story(7).text, write_story(10).text])
    assert written == [7, 10]
