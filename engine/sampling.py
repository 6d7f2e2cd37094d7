"""From logits to the next token: penalties, temperature, the usual cuts, and one draw per sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.errors import InputError

# Tokens that nearly always hold top_p of the probability. To sort them all takes a CPU as long as a small model's pass.
FEW = 512


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. The defaults change nothing but the temperature.

    temperature 0 takes the likeliest; top_k keeps the k likeliest; top_p the smallest set that holds this share of the
    probability (Holtzman et al., arXiv:1904.09751); min_p drops what is less likely than this share of the likeliest
    (Nguyen et al., arXiv:2407.01082); repetition_penalty above 1 makes tokens already in the text less likely (Keskar
    et al., arXiv:1909.05858). The same seed gives the same text.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def of_row(self, index: int) -> "Sampling":
        """Return the same for one of several texts. Their seeds lie far apart, so that those of two runs differ."""
        if self.seed is None or index == 0:
            return self
        return replace(self, seed=(self.seed + index * 0x9E3779B97F4A7C15) % 2**62)

    def __post_init__(self) -> None:
        good = {
            "temperature": (0 <= self.temperature <= 100, "between 0 and 100"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
            "seed": (self.seed is None or 0 <= self.seed < 2**62, "at least 0 and below 2**62"),
        }
        for name, (holds, expected) in good.items():
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {expected}")


def distribution(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None = None) -> Tensor:
    """Return probabilities of the next token, fp32 [B, V], temperature above 0. seen_BV: bool, tokens so far.

    The order matters: the penalty changes logits, temperature divides them, top_k cuts them; min_p and then top_p cut
    the probabilities that come of it, and what is left is made to sum to 1.
    """
    logits_BV = penalise(logits_BV.float(), sampling, seen_BV)
    # The likeliest at 0, and a temperature that fp32 can divide by: nearly cold must not overflow into NaN.
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / max(sampling.temperature, 1e-10)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        lowest = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < lowest, float("-inf"))
    probabilities = logits_BV.softmax(dim=-1)
    if sampling.min_p > 0:
        highest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * highest, 0.0)
    if sampling.top_p < 1:
        enough = sampling.top_p * probabilities.sum(dim=-1, keepdim=True)
        ordered, order = _likeliest_first(probabilities, enough)
        # A token stays while those before it hold less than top_p: at least one always does.
        before = ordered.cumsum(dim=-1) - ordered
        kept = ordered.masked_fill(before >= enough, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def _likeliest_first(probabilities_BV: Tensor, enough_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Return falling probabilities and their tokens: all, or on a CPU as many as hold `enough` in every row."""
    if probabilities_BV.device.type == "cpu" and probabilities_BV.shape[-1] > FEW:
        ordered, order = probabilities_BV.topk(FEW, dim=-1)
        if (ordered.sum(dim=-1, keepdim=True) > enough_B1).all():
            return ordered, order
    return probabilities_BV.sort(dim=-1, descending=True)


def penalise(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None) -> Tensor:
    """Return the logits after the repetition penalty on the tokens that the text holds already."""
    penalty = sampling.repetition_penalty
    if penalty == 1 or seen_BV is None:
        return logits_BV
    # Dividing a negative logit would make it likelier.
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def choose(
    logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator], seen_BV: Tensor | None = None
) -> Tensor:
    """Return the next token of each sequence, int64 [B]. Each draws one number from its own generator."""
    if sampling.temperature == 0:
        return penalise(logits_BV, sampling, seen_BV).argmax(dim=-1)
    if torch.are_deterministic_algorithms_enabled():
        logits_BV = logits_BV.cpu()  # sums in the order of the tokens, which a GPU does not promise
    cumulative_BV = distribution(logits_BV, sampling, seen_BV).cumsum(dim=-1)
    draws = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(logits_BV.device)
    # Against the last sum, which rounding may leave a little off 1: a draw can never fall beyond the last token.
    threshold = draws[:, None] * cumulative_BV[:, -1:]
    return (cumulative_BV <= threshold).sum(dim=-1).clamp(max=logits_BV.shape[-1] - 1)


def make_generator(seed: int | None) -> torch.Generator:
    """Return a generator on the CPU, so that a seed means the same on every device. None draws a seed."""
    generator = torch.Generator()
    return generator.manual_seed(generator.seed() if seed is None else seed)
