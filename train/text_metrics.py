"""Metrics of texts, and how sure of them one can be: BLEU, ROUGE, variety, bootstrap intervals, the sign test."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from engine.errors import InputError

RESAMPLES = 1000
ROUGE = ("rouge1", "rouge2", "rougeL")
# The scripts that are written without spaces between words, for the brackets of a regular expression: Thai and Lao,
# Burmese, Khmer, kana and Chinese characters.
UNSPACED = (
    "\u0e01-\u0edf\u1000-\u109f\u1780-\u17dd\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)


@dataclass(frozen=True)
class Estimate:
    """The value of a metric and the bounds of its 95% confidence interval; None where it has no such interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        bounds = [_figures(bound, 3) for bound in (self.low, self.high) if bound is not None]
        return _figures(self.value, 4) + (f" [{', '.join(bounds)}]" if bounds else "")


def _figures(number: float, digits: int) -> str:
    return f"{number:,.0f}" if number >= 10 ** (digits - 1) else f"{number:#.{digits}g}"


def bootstrap(statistics_NK: np.ndarray, metric: Callable[[np.ndarray], float], *, seed: int = 0) -> Estimate:
    """Return metric(sum of the N texts' statistics), with its percentile interval over resampled texts.

    Efron, "Bootstrap methods: another look at the jackknife" (1979); for BLEU: Koehn, W04-3250.
    """
    texts = len(statistics_NK)
    counts_RN = np.random.default_rng(seed).multinomial(texts, np.full(texts, 1 / texts), size=RESAMPLES)
    low, high = np.quantile([metric(sums_K) for sums_K in counts_RN @ statistics_NK], (0.025, 0.975))
    return Estimate(float(metric(statistics_NK.sum(axis=0))), float(low), float(high))


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean over texts."""
    return bootstrap(np.array(values, np.float64)[:, None], lambda sums: float(sums[0] / len(values)))


def bleu_metric(tokenizer: str) -> Any:
    """Return sacrebleu's metric with one of its tokenizers. Raises InputError where it cannot be had."""
    from sacrebleu.metrics.bleu import BLEU

    if tokenizer not in BLEU.TOKENIZERS:
        raise InputError(f"BLEU has no tokenizer {tokenizer!r}; sacrebleu has {', '.join(BLEU.TOKENIZERS)}")
    try:
        return BLEU(tokenize=tokenizer)
    # Some need a package, which sacrebleu names, and some a file from the network.
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        raise InputError(f"BLEU's tokenizer {tokenizer} cannot be loaded: {' '.join(str(error).split())}") from None


def bleu(texts: Sequence[str], *references: Sequence[str], tokenizer: str = "13a") -> tuple[Estimate, str]:
    """Return corpus BLEU, 0 to 100, and sacrebleu's signature of it. Each of `references` has one for every text.

    Papineni et al., P02-1040, as Post, arXiv:1804.08771, defines it.
    """
    metric = bleu_metric(tokenizer)
    scores = [
        metric.corpus_score([text], [[each] for each in own]) for text, *own in zip(texts, *references, strict=True)
    ]
    statistics = np.array([[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores])

    def from_sums(sums: np.ndarray) -> float:
        sys_len, ref_len, *ngrams = sums.tolist()
        correct, total = ngrams[: len(ngrams) // 2], ngrams[len(ngrams) // 2 :]
        return float(metric.compute_bleu(correct, total, sys_len, ref_len, smooth_method=metric.smooth_method).score)

    return bootstrap(statistics, from_sums), str(metric.get_signature())


def rouge_scorer(tokenizer: str) -> Any:
    """Return rouge-score's scorer: "default" compares stemmed words of a-z and 0-9, "words" those of any script."""
    from rouge_score.rouge_scorer import RougeScorer

    tokenizers = {"default": None, "words": AnyScript()}
    if tokenizer not in tokenizers:
        raise InputError(f"ROUGE has no tokenizer {tokenizer!r}, only {' and '.join(tokenizers)}")
    return RougeScorer(ROUGE, use_stemmer=True, tokenizer=tokenizers[tokenizer])


def rouge(texts: Sequence[str], references: Sequence[str], *, tokenizer: str = "default") -> dict[str, list[float]]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L of each text, 0 to 1: F1 over words. Lin, W04-1013."""
    scorer = rouge_scorer(tokenizer)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {kind: [score[kind].fmeasure for score in scores] for kind in ROUGE}


class AnyScript:
    """A tokenizer for rouge-score: the words of any script, without punctuation, and not stemmed."""

    def tokenize(self, text: str) -> list[str]:
        # Marks, too: many languages of India write vowels as such.
        kept = (letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in text)
        return words("".join(kept))


def overlooked(references: Sequence[str], bleu_tokenizer: str, rouge_tokenizer: str) -> list[str]:
    """Say in sentences what BLEU and ROUGE do not see in these texts with these tokenizers, if there is anything."""
    letters = [letter for reference in references for letter in reference.lower() if letter.isalpha()]
    foreign = sum(letter > "z" for letter in letters) / max(len(letters), 1)
    unspaced = len(re.findall(f"[{UNSPACED}]", "".join(letters))) / max(len(letters), 1)
    wordless = sum(not re.search("[a-z0-9]", text.lower()) and any(map(str.isalpha, text)) for text in references)
    notes = []
    if rouge_tokenizer == "default" and (wordless or foreign >= 0.01):
        notes.append(
            f"ROUGE: rouge-score's own tokenizer reads a-z and 0-9 alone. {foreign:.1%} of the references' letters are "
            f"others, and it finds no word in {wordless:,} of {len(references):,} references; --rouge-tokenizer words "
            "reads any script."
        )
    if bleu_tokenizer in ("13a", "intl", "none") and unspaced >= 0.01:
        notes.append(
            f"BLEU: the tokenizer {bleu_tokenizer} takes what stands between two spaces for a word. {unspaced:.1%} of "
            "the references' letters are of scripts without spaces; --bleu-tokenizer zh, ja-mecab or char cuts them."
        )
    return notes


def words(text: str) -> list[str]:
    """Return the words between white space, in lower case; in a script without spaces each character is a word."""
    return re.sub(f"[{UNSPACED}]", r" \g<0> ", text.lower()).split()


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    spelled = words(text)
    return list(zip(*(spelled[start:] for start in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int) -> float:
    """Return the share of different ones among all n-grams of words in all texts. Li et al., arXiv:1510.03055."""
    found = [ngram for text in texts for ngram in ngrams(text, n)]
    return len(set(found)) / max(len(found), 1)


def repetition(text: str) -> float:
    """Return the share of a text's groups of 4 words that it has said before. Welleck et al., arXiv:1908.04319."""
    found = ngrams(text, 4)
    return (len(found) - len(set(found))) / max(len(found), 1)


def summary(texts: Sequence[str], scores: Mapping[str, Sequence[float]]) -> dict[str, Estimate]:
    """Return the mean scores, and how varied and how long the texts are."""
    return {
        **{name: mean(values) for name, values in scores.items()},
        **{f"distinct{n}": Estimate(distinct(texts, n)) for n in (1, 2, 3)},
        "repeated_4grams": mean([repetition(text) for text in texts]),
        "words": mean([len(words(text)) for text in texts]),
    }


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return how often we are better, a tie counting half, and how likely chance alone would be as uneven."""
    signs = [(a > b) - (a < b) for a, b in zip(ours, theirs, strict=True)]
    wins, losses = signs.count(1), signs.count(-1)
    rate = mean([(sign + 1) / 2 for sign in signs])
    return {"wins": wins, "ties": signs.count(0), "losses": losses, "win_rate": rate, "p": sign_test(wins, losses)}


def sign_test(wins: int, losses: int) -> float:
    """Return the exact probability of a split at least this uneven were both sides as good; ties are left out."""
    games = wins + losses
    # The binomial coefficients of as few wins, or fewer: each from the one before.
    ways = accumulate(range(1, min(wins, losses) + 1), lambda ways, k: ways * (games - k + 1) // k, initial=1)
    return min(1.0, 2 * sum(ways) / 2**games)
