"""Every token of an epoch once, never across documents, and the same again from any cursor."""

import hashlib
import json
import threading
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from engine.processes import Processes
from train.data.loader import Batch, PackedLoader, Permutation


class Documents:
    """Documents in memory. Every token is its own number, so that a batch tells where it came from; eod is 0."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int64)
        self.fingerprint = hashlib.sha256(bytes(str(lengths), "ascii")).hexdigest()
        self.ends = self.lengths.cumsum()

    def read(self, document: int, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        last = int(self.ends[document])
        ids = np.arange(last - self.lengths[document], last + 1) + 1
        ids[-1] = 0
        part = ids[offset : offset + length + 1]
        assert len(part) == length + 1
        return part[:-1], part[1:]


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def loader(documents: Documents, tokens: int = 16, context: int = 8, **options: Any) -> PackedLoader:
    return PackedLoader(documents, tokens, context, **{"seed": 1, "prefetch": 0, **options})


def equal(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, key), getattr(right, key)) for key in ("tokens", "targets", "cu_seqlens"))


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 9))
def test_a_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, epoch)
    assert sorted(order(np.arange(size)).tolist()) == list(range(size))
    assert order(np.array([size // 2])) == order(np.arange(size))[size // 2]


def test_a_permutation_mixes_and_changes_with_its_key() -> None:
    first, other = (Permutation(100_000, 7, epoch)(np.arange(100_000)) for epoch in (0, 1))
    for order in (first, other):
        assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
        assert (np.abs(np.diff(order)) < 100).mean() < 0.01
    assert (first == other).mean() < 0.001


def test_a_permutation_of_more_than_2_to_the_32_needs_no_table() -> None:
    values = Permutation(10**12, 1)(np.arange(10**12 - 1000, 10**12))
    assert len(set(values.tolist())) == 1000
    assert 0 <= values.min() < 10**11 < 9 * 10**11 < values.max() < 10**12


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 50), st.integers(1, 50), st.booleans())
def test_an_epoch_trains_every_token_once_within_its_document(
    lengths: list[int], tokens: int, context: int, shuffle: bool
) -> None:
    documents = Documents(lengths)
    tokens = min(tokens, sum(lengths))
    batches = list(islice(loader(documents, tokens, context, shuffle=shuffle), -(-sum(lengths) // tokens)))
    seen = torch.cat([batch.tokens for batch in batches]).tolist()[: sum(lengths)]
    assert sorted(seen) == list(range(1, sum(lengths) + 1))
    assert shuffle or seen == sorted(seen)
    assert all(len(batch.tokens) == tokens for batch in batches)
    ends = set(documents.ends.tolist())
    for batch in batches:
        expected = torch.tensor([0 if token in ends else token + 1 for token in batch.tokens.tolist()])
        assert torch.equal(batch.targets, expected)
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == len(batch.tokens) and batch.max_seqlen == context
        for start, stop in pairwise(bounds):
            sequence = batch.tokens[start:stop].tolist()
            assert 0 < len(sequence) <= context
            assert sequence == list(range(sequence[0], sequence[0] + len(sequence)))
            assert not ends & set(sequence[:-1])


def test_dtypes_are_those_that_kernels_expect() -> None:
    batch = next(loader(Documents([40])))
    assert (batch.tokens.dtype, batch.targets.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)


def test_epochs_differ_and_batches_run_across_them() -> None:
    documents = Documents([5, 9, 3, 17, 8, 20, 1, 30])
    endless = loader(documents, tokens=10)
    stream = torch.cat([batch.tokens for batch in islice(endless, 28)]).tolist()
    epochs = [stream[start : start + 93] for start in (0, 93, 186)]
    assert all(sorted(epoch) == list(range(1, 94)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert endless.epoch == pytest.approx(280 / 93)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 20), st.integers(1, 20), st.integers(0, 30), st.sampled_from([0, 3]))
def test_a_loader_resumes_to_the_bit(lengths: list[int], tokens: int, context: int, stop: int, prefetch: int) -> None:
    documents = Documents(lengths)
    tokens = min(tokens, sum(lengths))
    first = loader(documents, tokens, context, prefetch=prefetch)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    expected = list(islice(first, 10))
    first.close()
    second = loader(documents, tokens, context, prefetch=prefetch)
    second.load_state_dict(state)
    assert all(map(equal, islice(second, 10), expected))
    # The same loader, too, can be sent back.
    second.load_state_dict(state)
    assert equal(next(second), expected[0])
    assert (second.state_dict()["batches"], second.state_dict()["tokens"]) == (stop + 1, (stop + 1) * tokens)
    second.close()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_processes_share_every_batch_by_whole_segments(count: int, whole: bool) -> None:
    documents = Documents([5, 9, 3, 17, 8, 20, 1, 30])
    alone = list(islice(loader(documents, whole=whole), 24))
    team = [loader(documents, whole=whole, processes=Processes(rank, count)) for rank in range(count)]
    for batch in alone:
        shares = [next(each) for each in team]
        together, everything = [
            [part.tolist() for each in batches for part in each.tokens.split(each.cu_seqlens.diff().tolist())]
            for batches in (shares, [batch])
        ]
        # Padding aside, which many processes have only where one would have nothing.
        assert [part for part in together if any(part)] == [part for part in everything if any(part)]
        assert count > 2 or max(len(share.tokens) for share in shares) <= 16 / count + 8
        assert all(len(share.tokens) for share in shares)
    assert all(each.state_dict() == team[0].state_dict() for each in team)


def test_another_number_of_processes_goes_on_with_the_same_stream() -> None:
    documents = Documents([5, 9, 3, 17, 8, 20, 1, 30])
    alone = list(islice(loader(documents), 24))
    two = loader(documents, processes=Processes(1, 2))
    for _ in range(12):
        next(two)
    one = loader(documents)
    one.load_state_dict(two.state_dict())
    assert all(equal(batch, next(one)) for batch in alone[12:])


def test_a_state_of_something_else_is_refused_by_name() -> None:
    documents = Documents([20, 30])
    state = loader(documents).state_dict()
    for key, other in {
        "data": loader(Documents([20, 31])),
        "context": loader(documents, context=9),
        "seed": loader(documents, seed=2),
        "order": loader(documents, shuffle=False),
    }.items():
        with pytest.raises(InputError, match=f"cannot be resumed with another {key}: it was .*, now it is"):
            other.load_state_dict(state)


def test_too_little_data_is_said_with_numbers() -> None:
    with pytest.raises(InputError, match="the data has 50 tokens, too few for one batch of 64; give more data"):
        loader(Documents([20, 30]), tokens=64)


def test_prefetching_changes_nothing() -> None:
    documents = Documents([5, 9, 3, 17, 8, 20, 1, 30])
    plain, ahead = list(islice(loader(documents), 12)), loader(documents, prefetch=1)
    assert all(map(equal, plain, ahead))
    ahead.close()


def test_what_goes_wrong_ahead_reaches_the_consumer() -> None:
    class Broken(Documents):
        def read(self, document: int, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
            raise OSError("the disk is gone")

    broken = loader(Broken([40]), prefetch=2)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(broken)
    broken.close()


def test_closing_never_hangs_and_leaves_no_thread() -> None:
    before = {*threading.enumerate()}
    for taken in range(20):
        closing = loader(Documents([40] * 10), prefetch=1 + taken % 3)
        list(islice(closing, taken % 5 + 1))
        closing.close()
        closing.close()
    assert {*threading.enumerate()} <= before


@given(LENGTHS, st.integers(1, 1200))
def test_a_batch_is_cut_between_sequences_into_parts_about_equal(lengths: list[int], parts: int) -> None:
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    tokens = torch.arange(sum(lengths))
    batch = Batch(tokens, tokens + 1, bounds, 40)
    found = batch.split(parts)
    assert torch.equal(torch.cat([part.tokens for part in found]), batch.tokens)
    assert torch.equal(torch.cat([part.targets for part in found]), batch.targets)
    assert [length for part in found for length in part.cu_seqlens.diff().tolist()] == lengths
    assert all(part.max_seqlen == 40 and part.cu_seqlens.dtype == torch.int32 for part in found)
    assert min(2, len(lengths), parts) <= len(found) <= parts
    assert max(len(part.tokens) for part in found) <= sum(lengths) / parts + max(lengths)
    if parts >= sum(lengths):
        assert len(found) == len(lengths)


def test_a_batch_moves_whole() -> None:
    batch = Batch(torch.arange(12), torch.arange(12) + 1, torch.tensor([0, 5, 6, 12], dtype=torch.int32), 8)
    assert equal(batch.to("cpu"), batch)
