"""Measures of texts, and how sure of them one can be: BLEU, ROUGE, variety, bootstrap intervals, the sign test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Estimate:
    """A measure and the bounds of its 95% confidence interval; None where it has no such interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        bounds = [_figures(bound, 3) for bound in (self.low, self.high) if bound is not None]
        return _figures(self.value, 4) + (f" [{', '.join(bounds)}]" if bounds else "")


def _figures(number: float, digits: int) -> str:
    return f"{number:,.0f}" if number >= 10 ** (digits - 1) else f"{number:#.{digits}g}"


def bootstrap(
    statistics_NK: np.ndarray, measure: Callable[[np.ndarray], float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """measure(sum of the N texts' statistics), with its percentile interval over resampled texts.

    Efron, "Bootstrap methods: another look at the jackknife" (1979); for BLEU: Koehn, W04-3250.
    """
    texts = len(statistics_NK)
    drawn_RN = np.random.default_rng(seed).multinomial(texts, np.full(texts, 1 / texts), size=resamples)
    low, high = np.quantile([measure(sums_K) for sums_K in drawn_RN @ statistics_NK], (0.025, 0.975))
    return Estimate(float(measure(statistics_NK.sum(axis=0))), float(low), float(high))


def mean(values: Sequence[float]) -> Estimate:
    """The mean over texts."""
    return bootstrap(np.array(values, np.float64)[:, None], lambda sums: sums[0] / len(values))


def bleu(texts: Sequence[str], *references: Sequence[str]) -> tuple[Estimate, str]:
    """Corpus BLEU, 0 to 100, and sacrebleu's signature of it. Each of `references` has one for every text.

    Papineni et al., P02-1040, as Post, arXiv:1804.08771, defines it.
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    scores = [
        metric.corpus_score([text], [[each] for each in own]) for text, *own in zip(texts, *references, strict=True)
    ]
    statistics = np.array([[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores])

    def from_sums(sums: np.ndarray) -> float:
        sys_len, ref_len, *ngrams = sums.tolist()
        correct, total = ngrams[: len(ngrams) // 2], ngrams[len(ngrams) // 2 :]
        return metric.compute_bleu(correct, total, sys_len, ref_len, smooth_method=metric.smooth_method).score

    return bootstrap(statistics, from_sums), str(metric.get_signature())


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of each text, 0 to 1: F1 over stemmed words. Lin, W04-1013."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {kind: [score[kind].fmeasure for score in scores] for kind in ROUGE}


def words(text: str) -> list[str]:
    return text.lower().split()


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    spelled = words(text)
    return list(zip(*(spelled[start:] for start in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int) -> float:
    """Of all n-grams of words in all texts, the share that are different ones. Li et al., arXiv:1510.03055."""
    found = [ngram for text in texts for ngram in ngrams(text, n)]
    return len(set(found)) / max(len(found), 1)


def repetition(text: str, n: int = 4) -> float:
    """Of the n-grams of words in a text, the share that it has said before. Welleck et al., arXiv:1908.04319."""
    found = ngrams(text, n)
    return (len(found) - len(set(found))) / max(len(found), 1)


def sign_test(wins: int, losses: int) -> float:
    """The probability of a split at least this uneven, either way, were both sides as good. Exact; ties left out."""
    games = wins + losses
    tail = ways = 1
    for k in range(1, min(wins, losses) + 1):
        ways = ways * (games - k + 1) // k
        tail += ways
    return min(1.0, 2 * tail / 2**games)
