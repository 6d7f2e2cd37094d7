"""Metrics against published values and closed forms."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InputError
from train.text_metrics import (
    Estimate,
    bleu,
    bootstrap,
    compare,
    distinct,
    mean,
    overlooked,
    repetition,
    rouge,
    sign_test,
    words,
)

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


RUSSIAN, CHINESE = "Лиса бежала по лесу домой.", "狐狸在树林里跑回家。"


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        (RUSSIAN, RUSSIAN.upper(), 1.0),
        (CHINESE, CHINESE, 1.0),
        ("лиса, по лесу", "Лиса бежала по лесу", 6 / 7),
        ("狐狸跑", "狐狸在跑。", 6 / 7),
        ("हिन्दी भाषा", "हिन्दू भाषा", 0.5),
        ("It is killed", "it is kill", 2 / 3),
    ],
)
def test_rouge_reads_any_script_when_asked_to(text: str, reference: str, expected: float) -> None:
    pytest.importorskip("rouge_score")
    assert rouge([text], [reference], tokenizer="words")["rouge1"] == pytest.approx([expected])


@pytest.mark.parametrize("text", [RUSSIAN, CHINESE])
def test_what_the_default_tokenizers_overlook_is_said(text: str) -> None:
    pytest.importorskip("rouge_score")
    assert rouge([text], [text])["rouge1"] == [0.0]
    notes = overlooked([text, "A fox ran."], "13a", "default")
    assert "no word in 1 of 2 references" in notes[0] and "--rouge-tokenizer words" in notes[0]
    assert (len(notes) == 2 and "--bleu-tokenizer zh" in notes[1]) == (text == CHINESE)
    assert not overlooked([text], "zh", "words")


def test_nothing_is_said_of_texts_that_are_read_whole() -> None:
    english = ["The café was shut, 90 miles from home.", "It is late. " * 20, "...", "", "1 2 3"]
    assert not overlooked(english, "13a", "default") and not overlooked([], "13a", "default")
    assert "50.0% of the references' letters" in overlooked(["Ça été un été"], "13a", "default")[0]


def test_bleu_has_the_tokenizers_of_sacrebleu() -> None:
    pytest.importorskip("sacrebleu")
    texts, references = ["狐狸在树林里跑回家了。"], [CHINESE]
    (whole, signature), (cut, other) = bleu(texts, references), bleu(texts, references, tokenizer="zh")
    assert whole.value == 0.0 and "tok:13a" in signature
    assert cut.value > 50 and "tok:zh" in other
    with pytest.raises(InputError, match=r"no tokenizer 'chinese'; sacrebleu has .*13a, intl"):
        bleu(texts, references, tokenizer="chinese")


@pytest.mark.parametrize(("tokenizer", "package"), [("ja-mecab", "MeCab"), ("ko-mecab", "mecab_ko")])
def test_a_tokenizer_whose_package_is_missing_is_refused(
    tokenizer: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sacrebleu")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"sacrebleu.tokenizers.tokenizer_{tokenizer.replace('-', '_')}", raising=False)
    with pytest.raises(InputError, match=rf"{tokenizer} cannot be loaded: .*pip install sacrebleu\[{tokenizer[:2]}\]"):
        bleu(["a"], ["a"], tokenizer=tokenizer)


def test_a_tokenizer_that_cannot_be_fetched_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spm = pytest.importorskip("sacrebleu.tokenizers.tokenizer_spm")

    def fail(url: str, path: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(spm, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr(spm, "download_file", fail)
    with pytest.raises(InputError, match="flores200 cannot be loaded: no network"):
        bleu(["a"], ["a"], tokenizer="flores200")


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


def test_a_script_without_spaces_has_words_too() -> None:
    assert words("Das ist gut, ABC 狐狸。カナ") == ["das", "ist", "gut,", "abc", "狐", "狸", "。", "カ", "ナ"]
    assert distinct(["狐狸狐狸"], 1) == 0.5 and repetition("狐狸在树狐狸在树") == 1 / 5
    assert words("Лиса бежала") == ["лиса", "бежала"] and repetition("да да да да да да") == 2 / 3


@pytest.mark.parametrize(
    ("wins", "losses", "probability"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (0, 10, 2 / 2**10), (8, 2, 2 * (1 + 10 + 45) / 2**10)],
)
def test_the_sign_test_is_exact(wins: int, losses: int, probability: float) -> None:
    assert sign_test(wins, losses) == sign_test(losses, wins) == probability


def test_the_sign_test_takes_thousands() -> None:
    assert 0 < sign_test(5200, 4800) < 1e-4


def test_wins_count_one_and_ties_a_half() -> None:
    result = compare([1.0, 2.0, 3.0, 3.0], [0.0, 2.0, 4.0, 1.0])
    assert (result["wins"], result["ties"], result["losses"], result["win_rate"].value) == (2, 1, 1, 0.625)


def test_an_estimate_reads_well() -> None:
    assert str(Estimate(28.3012, 27.6, 29.0)) == "28.30 [27.6, 29.0]"
    assert str(Estimate(124.23, 120.4, 128.0)) == "124.2 [120, 128]"
    assert str(Estimate(74_096.2)) == "74,096"
