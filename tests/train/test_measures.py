"""Measures against published values and closed forms."""

import os
from pathlib import Path

import numpy as np
import pytest

from train.measures import Estimate, bleu, bootstrap, distinct, mean, repetition, rouge, sign_test

# From the tests of sacrebleu (test_bleu.py): its defaults, two references for each text.
HYPOTHESES = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = (
    ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
    ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."],
)


def test_bleu_is_the_published_value() -> None:
    pytest.importorskip("sacrebleu")
    estimate, signature = bleu(HYPOTHESES, *REFERENCES)
    assert estimate.value == pytest.approx(48.530827, abs=1e-6)
    assert "tok:13a" in signature and "smooth:exp" in signature and "nrefs:2" in signature


# WMT17 newstest2017 en-de, 3004 sentences, by mteval-v13a (sacrebleu's test.sh). GPT_REFERENCE_DATA names a folder with
# NAME.de and reference.de, a sentence a line.
@pytest.mark.parametrize(
    ("system", "expected"), [("uedin-nmt", 28.30), ("LMU-nmt-reranked", 27.11), ("online-G", 18.16)]
)
def test_bleu_of_whole_systems_is_the_published_value(system: str, expected: float) -> None:
    pytest.importorskip("sacrebleu")
    if not (folder := os.environ.get("GPT_REFERENCE_DATA")):
        pytest.skip("GPT_REFERENCE_DATA names no folder with translations of WMT17")
    texts, references = (
        (Path(folder) / f"{name}.de").read_text("utf-8").rstrip("\n").split("\n") for name in (system, "reference")
    )
    assert len(texts) == len(references) == 3004
    estimate, _ = bleu(texts, references)
    assert round(estimate.value, 2) == expected
    assert estimate.low is not None and estimate.high is not None and estimate.high - estimate.low < 2


def test_rouge_is_that_of_its_inventor() -> None:
    """The example of Lin, W04-1013, section 3: a stem apart, and the order of words."""
    pytest.importorskip("rouge_score")
    found = rouge(["police kill the gunman", "the gunman kill police"], ["police killed the gunman"] * 2)
    assert found["rouge1"] == [1.0, 1.0]
    assert found["rouge2"] == pytest.approx([1.0, 1 / 3])
    assert found["rougeL"] == pytest.approx([1.0, 0.5])


def test_an_interval_is_that_of_the_normal_distribution_where_texts_are_many() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400).tolist()
    estimate = mean(values)
    assert estimate == mean(values)
    assert estimate.value == pytest.approx(np.mean(values))
    assert estimate.low is not None and estimate.high is not None
    half = 1.96 * np.std(values) / 20
    assert estimate.low == pytest.approx(estimate.value - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(estimate.value + half, abs=0.15 * half)


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    draws = np.random.default_rng(2).random((200, 60)) < 0.3
    estimates = [mean(row.tolist()) for row in draws]
    covered = sum(each.low <= 0.3 <= each.high for each in estimates if each.low is not None and each.high is not None)
    assert 180 <= covered <= 198


def test_another_seed_draws_other_texts() -> None:
    statistics = np.arange(20.0)[:, None]
    first, second = (bootstrap(statistics, lambda sums: sums[0] / 20, seed=seed) for seed in (0, 1))
    assert first.value == second.value and first != second


def test_distinct_ngrams_are_counted_over_all_texts() -> None:
    texts = ["the cat saw the dog", "The cat ran"]
    assert distinct(texts, 1) == 5 / 8
    assert distinct(texts, 2) == 5 / 6
    assert distinct(texts, 3) == 1.0
    assert distinct(["one"], 2) == 0.0


def test_repetition_is_what_a_text_has_said_before() -> None:
    assert repetition("a b c d e f") == 0.0
    assert repetition("a b c d a b c d") == 1 / 5
    assert repetition("no no no no no no") == 2 / 3
    assert repetition("too short") == 0.0


@pytest.mark.parametrize(
    ("wins", "losses", "probability"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (0, 10, 2 / 2**10), (8, 2, 2 * (1 + 10 + 45) / 2**10)],
)
def test_the_sign_test_is_exact(wins: int, losses: int, probability: float) -> None:
    assert sign_test(wins, losses) == sign_test(losses, wins) == probability


def test_the_sign_test_takes_thousands() -> None:
    assert 0 < sign_test(5200, 4800) < 1e-4


def test_an_estimate_reads_well() -> None:
    assert str(Estimate(28.3012, 27.6, 29.0)) == "28.30 [27.6, 29.0]"
    assert str(Estimate(124.23, 120.4, 128.0)) == "124.2 [120, 128]"
    assert str(Estimate(74_096.2)) == "74,096"
