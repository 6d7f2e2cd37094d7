"""The reward model: the Transformer of a finetuned run, and a head that says how well a person would like an answer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig, Recipe, RewardConfig
from engine.errors import InputError
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime, inference
from engine.tokenizer import Tokenizer
from rlhf.log_probs import sequence_log_probs, target_answers
from train.data.loader import Batch

# What is scored at a time, unless one sequence alone is longer.
SCORING_TOKENS = 8192


class RewardModel(GPT):
    """Scores a conversation by the hidden state at its last token, the <|end|> of the answer.

    The head is fp32 and has no bias: a preference does not know of one. `mean` and `std` are those of the rewards of
    the finetuned model's own answers; `score` counts from there.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        # As in Stiennon et al. 2020: rewards begin with a standard deviation near 1.
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.width + 1))
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.register_buffer("std", torch.ones(()), persistent=False)

    @classmethod
    def load(cls, run: Run, runtime: Runtime, which: str = "latest") -> "RewardModel":
        """The trained reward model of a run, normalised. Raises InputError where the run holds none."""
        recipe = run.read_recipe()
        if not recipe.scores:
            raise InputError(f"{run.path} is no reward model; train one with `gpt reward {run.path}`")
        found = run.find_checkpoint(which)
        measured = found.evaluation() or {}
        if not {"sample_mean", "sample_std"} <= measured.keys():
            raise InputError(f"{found.path} was not measured to its end; go on with `gpt reward ... --resume`")
        model = ImplicitRewardModel.begin(recipe, run, runtime) if recipe.reward.implicit else cls(recipe.model)
        model.load_state_dict(found.tensors("model"))
        model.normalise(measured["sample_mean"], measured["sample_std"])
        model.compute_dtype = runtime.dtype
        return model.to(runtime.device).eval()

    def normalise(self, mean: float, std: float) -> None:
        self.mean.fill_(mean)
        self.std.fill_(max(std, 1e-6))

    def take_backbone(self, weights: dict[str, Tensor]) -> None:
        """The weights of a language model, all but its head."""
        self.load_state_dict({**weights, "head.weight": self.head.weight})

    def rewards(self, hidden: Tensor) -> Tensor:
        """The reward of every hidden state, before normalisation. [..., C] -> fp32 [...]"""
        return F.linear(hidden.float(), self.head.weight.float())[..., 0]

    def last_rewards(self, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The reward of every packed sequence, at its last token, before normalisation. fp32 [sequences]"""
        hidden = self(tokens, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return self.rewards(hidden[cu_seqlens[1:].long() - 1])

    def score(self, sequences: Sequence[Sequence[int]], tokens_per_batch: int = SCORING_TOKENS) -> Tensor:
        """Normalised rewards of whole conversations (token ids), in order: fp32 [n], on the CPU.

        A conversation scores the same whatever is scored beside it. Raises InputError for one that is empty or longer
        than the context.
        """
        device = self.embedding.weight.device
        found = []
        with inference(self):
            for some in _batches(sequences, self.config.context, tokens_per_batch):
                tokens = torch.tensor([token for each in some for token in each], device=device)
                bounds = torch.tensor([0, *map(len, some)], dtype=torch.int32, device=device).cumsum(0).int()
                found.append(self.last_rewards(tokens, bounds, max(map(len, some))))
        return ((torch.cat(found) - self.mean) / self.std).cpu() if found else torch.empty(0)


class ImplicitRewardModel(RewardModel):
    """A language model as a reward model: beta times the log of how much likelier it finds an answer than the base.

    Rafailov et al., arXiv:2305.18290, section 5: every language model is one. Where a model is small and comparisons
    are few it tells far more of them right than a head on the last hidden state: what was asked for is heeded at every
    token already, and need not first be gathered at the end.
    """

    def __init__(self, config: ModelConfig, reference: GPT, assistant: int, beta: float) -> None:
        super().__init__(config)
        self.assistant, self.beta = assistant, beta
        self._reference = (reference,)  # in a tuple it is no part of this module: neither trained nor saved

    @classmethod
    def begin(cls, recipe: Recipe, run: Run, runtime: Runtime) -> "ImplicitRewardModel":
        """As it is before it has learnt, beside the base of its run. Raises InputError where that is gone."""
        reference = load_frozen(Run(Path(str(recipe.base))), runtime, str(recipe.base_step), recipe.model.context)
        assistant = Tokenizer.load(run.tokenizer).special["<|assistant|>"]
        return cls(recipe.model, reference, assistant, recipe.reward.beta)

    def take_backbone(self, weights: dict[str, Tensor]) -> None:
        """All the weights of the base: its head is what scores."""
        self.load_state_dict(weights)

    def last_rewards(self, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The reward of the last answer of every packed conversation, before normalisation. fp32 [sequences]"""
        answers = target_answers(Batch(tokens, tokens, cu_seqlens, max_seqlen), self.assistant)
        with torch.no_grad():
            before = sequence_log_probs(self._reference[0], answers)
        return self.beta * (sequence_log_probs(self, answers) - before)


def load_frozen(run: Run, runtime: Runtime, which: str, context: int | None = None) -> GPT:
    """A model to draw from and to compare with. Its weights stay fp32, or a policy's first KL would not be 0."""
    model, _ = run.load_model(replace(runtime, precision="fp32"), which)
    model.compute_dtype = runtime.dtype
    model.config = replace(model.config, context=context or model.config.context)
    return model.requires_grad_(False)


def _batches(sequences: Sequence[Sequence[int]], context: int, tokens_per_batch: int) -> Iterator[list[Sequence[int]]]:
    held: list[Sequence[int]] = []
    size = 0
    for number, sequence in enumerate(sequences):
        if not 0 < len(sequence) <= context:
            raise InputError(f"sequence {number} has {len(sequence)} tokens; a reward needs 1 to {context}")
        if held and size + len(sequence) > tokens_per_batch:
            yield held
            held, size = [], 0
        held.append(sequence)
        size += len(sequence)
    if held:
        yield held


def preference_loss(model: RewardModel, batch: Batch, config: RewardConfig) -> Tensor:
    """Bradley-Terry loss of a packed batch of pairs (sequences 2k and 2k + 1: chosen, rejected), summed, in nats.

    -log sigmoid(r_chosen - r_rejected - margin) + centring * (r_chosen + r_rejected)**2: the second term settles what
    the first leaves open, where 0 lies (Eisenstein et al. 2023). A sequence left over is padding.
    """
    rewards = model.last_rewards(batch.tokens, batch.cu_seqlens, batch.max_seqlen)
    chosen, rejected = rewards[: len(rewards) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
    return (config.centring * (chosen + rejected) ** 2 - F.logsigmoid(chosen - rejected - config.margin)).sum()


def measure_preferences(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """How well rewards [pairs] predict which answer was chosen. Ties count half; the loss is without margin, in nats.

    The calibration error (Naeini et al. 2015) compares, in ten bins of confidence, the share of pairs told right with
    the probability that the model gave: sigmoid of the difference.
    """
    difference = (chosen - rejected).double()
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    confidence = difference.abs().sigmoid()
    bins = (20 * (confidence - 0.5)).long().clamp(0, 9)
    gaps = torch.zeros(10, dtype=torch.float64).index_add(0, bins, right - confidence)
    return {
        "loss": float(-F.logsigmoid(difference).mean()),
        "accuracy": float(right.mean()),
        "calibration_error": float(gaps.abs().sum() / len(difference)),
        **{
            f"{name}_{what}": float(value)
            for name, rewards in (("chosen", chosen), ("rejected", rejected))
            for what, value in (("mean", rewards.mean()), ("std", rewards.std(correction=0)))
        },
    }
