"""From logits to the next token: penalties, temperature, the usual cuts, and one draw per sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from engine.config import AddedPenalty, Count, Decay, Penalty, Seed, Settings, Temperature, TopP, check_bounds

# Tokens that nearly always hold top_p of the probability. To sort them all takes a CPU as long as a small model's pass.
FEW = 512


@dataclass(frozen=True)
class Sampling(Settings):
    """How to choose the next token. The defaults change nothing but the temperature.

    logit_bias holds tokens and what is added to their logits, of which -100 forbids and 100 demands. It and the last
    two penalties are OpenAI's. As in vLLM, a penalty for presence or frequency counts the tokens that were generated,
    never those of the prompt, which a repetition penalty counts too.
    """

    temperature: Annotated[Temperature, "0 takes the likeliest token."] = 1.0
    top_k: Annotated[Count | None, "Keep the k likeliest tokens."] = None
    # top_p: Holtzman et al., arXiv:1904.09751; min_p: Nguyen et al., 2407.01082; the penalty: Keskar et al., 1909.05858
    top_p: Annotated[TopP, "Keep the fewest tokens that hold this share."] = 1.0
    min_p: Annotated[Decay, "Drop what is less likely than this share of the likeliest."] = 0.0
    repetition_penalty: Annotated[Penalty, "Above 1, the text repeats less."] = 1.0
    presence_penalty: Annotated[AddedPenalty, "Taken from the logits of tokens that were generated."] = 0.0
    frequency_penalty: Annotated[AddedPenalty, "The same, as often as they were generated."] = 0.0
    seed: Annotated[Seed | None, "The same seed gives the same text."] = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for token, bias in self.logit_bias:
            check_bounds(f"logit_bias of token {token}", bias, ["at least -100 and at most 100"])

    @property
    def changes_logits(self) -> bool:
        """Say whether a text needs a Past."""
        added = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return self.repetition_penalty != 1 or bool(added)

    def of_row(self, index: int) -> "Sampling":
        """Return the same for one of several texts. Their seeds lie far apart, so that those of two runs differ."""
        if self.seed is None or index == 0:
            return self
        return replace(self, seed=(self.seed + index * 0x9E3779B97F4A7C15) % 2**62)


class Past(NamedTuple):
    """What the tokens of a text, and a bias, change of its next logits: [V] each, of several texts [B, V]."""

    seen: Tensor  # uint8: 2 where a token was generated, 1 where it stands in the prompt alone
    added: Tensor  # fp32: the bias, less the penalties of what was generated

    def note(self, token: Tensor, sampling: Sampling) -> None:
        """Count a generated token, int64 [1]. Nothing waits for the device."""
        fresh = self.seen[token] < 2
        self.added[token] -= sampling.frequency_penalty + sampling.presence_penalty * fresh
        self.seen.index_fill_(0, token, 2)


def begin_past(sampling: Sampling, prompt: Sequence[int], vocab: int, generated: int = 0) -> Past:
    """Return the past of a prompt, on the CPU. Its last `generated` tokens were generated."""
    past, tokens = Past(torch.zeros(vocab, dtype=torch.uint8), torch.zeros(vocab)), torch.tensor(prompt)
    past.seen[tokens] = 1
    if sampling.logit_bias:
        biased, biases = zip(*sampling.logit_bias, strict=True)
        past.added[list(biased)] = torch.tensor(biases)
    for token in tokens[len(prompt) - generated :]:
        past.note(token[None], sampling)
    return past


def distribution(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities of the next token, fp32 [B, V], temperature above 0, of logits that `penalise` has changed.

    The order matters: temperature divides the logits, top_k cuts them; min_p and then top_p cut the probabilities that
    come of it, and what is left is made to sum to 1.
    """
    logits_BV = logits_BV.float()
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


def penalise(logits_BV: Tensor, sampling: Sampling, past: Past | None) -> Tensor:
    """Return the logits after the repetition penalty on the tokens that the text holds already, and what is added."""
    if past is None:
        return logits_BV
    penalty = sampling.repetition_penalty
    # Dividing a negative logit would make it likelier.
    scaled = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(past.seen > 0, scaled, logits_BV) + past.added


def choose(
    logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator], past: Past | None = None
) -> Tensor:
    """Return the next token of each sequence, int64 [B]. Each draws one number from its own generator."""
    logits_BV = penalise(logits_BV, sampling, past)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    if torch.are_deterministic_algorithms_enabled():
        logits_BV = logits_BV.cpu()  # sums in the order of the tokens, which a GPU does not promise
    cumulative_BV = distribution(logits_BV, sampling).cumsum(dim=-1)
    draws = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(logits_BV.device)
    # Against the last sum, which rounding may leave a little off 1: a draw can never fall beyond the last token.
    threshold = draws[:, None] * cumulative_BV[:, -1:]
    return (cumulative_BV <= threshold).sum(dim=-1).clamp(max=logits_BV.shape[-1] - 1)


def make_generator(seed: int | None) -> torch.Generator:
    """Return a generator on the CPU, so that a seed means the same on every device. None draws a seed."""
    generator = torch.Generator()
    return generator.manual_seed(generator.seed() if seed is None else seed)
