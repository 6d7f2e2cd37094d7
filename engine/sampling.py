"""From logits to the next token: penalties, temperature, the usual cuts, and one draw per sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from engine.config import Count, Decay, Penalty, Seed, Settings, Temperature, TopP

# Tokens that nearly always hold top_p of the probability. To sort them all takes a CPU as long as a small model's pass.
FEW = 512


@dataclass(frozen=True)
class Sampling(Settings):
    """How to choose the next token. The defaults change nothing but the temperature."""

    temperature: Annotated[Temperature, "0 takes the likeliest token."] = 1.0
    top_k: Annotated[Count | None, "Keep the k likeliest tokens."] = None
    # top_p: Holtzman et al., arXiv:1904.09751; min_p: Nguyen et al., 2407.01082; the penalty: Keskar et al., 1909.05858
    top_p: Annotated[TopP, "Keep the fewest tokens that hold this share."] = 1.0
    min_p: Annotated[Decay, "Drop what is less likely than this share of the likeliest."] = 0.0
    repetition_penalty: Annotated[Penalty, "Above 1, the text repeats less."] = 1.0
    seed: Annotated[Seed | None, "The same seed gives the same text."] = None

    def of_row(self, index: int) -> "Sampling":
        """Return the same for one of several texts. Their seeds lie far apart, so that those of two runs differ."""
        if self.seed is None or index == 0:
            return self
        return replace(self, seed=(self.seed + index * 0x9E3779B97F4A7C15) % 2**62)


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
