"""Low-rank adapters: the weights of a model stay as they are, and thin matrices beside its maps learn.

Hu et al., arXiv:2106.09685. A map x @ W.T becomes x @ W.T + alpha / rank * (x @ A.T) @ B.T, with A [rank, in] and
B [out, rank]. B begins as zeros, so the model begins as it was. Only A and B have gradients and an optimizer's state.
A checkpoint holds them beside the weights, so that a run goes on as if it had never stopped; whoever else reads it gets
the weights of a plain model, in which they are `merged`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import LoraConfig
from engine.model import GPT, Linear

SCALE = "lora_scale"  # alpha / rank, among the weights of a model with adapters


class Adapted(Linear):
    """A linear layer, with the weights of another one, and its adapter."""

    def __init__(self, plain: Linear, config: LoraConfig) -> None:
        with torch.device("meta"):
            super().__init__(plain.in_features, *plain.outputs, bias=plain.bias is not None)
        self.weight, self.bias, self.scale = plain.weight, plain.bias, config.alpha / config.rank
        # They are fp32 whatever the weights are: in a shorter dtype a small step of the optimizer would be lost.
        self.lora_a = nn.Parameter(torch.empty(config.rank, plain.in_features, device=plain.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(plain.out_features, config.rank, device=plain.weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        narrow = self.scale * F.linear(input, self.lora_a.to(input.dtype))
        return super().forward(input).add_(F.linear(narrow, self.lora_b.to(input.dtype)))

    def merged(self) -> Tensor:
        return _merge(self.weight, self.lora_a, self.lora_b, self.scale)


def adapt(model: GPT, config: LoraConfig) -> None:
    """Freeze a model and give its maps adapters. A reward model's head, which is new, learns as it is."""
    freeze(model)
    for block in model.blocks:
        for name in config.chosen:
            plain = block.get_submodule(name)
            assert isinstance(plain, Linear)
            block.set_submodule(name, Adapted(plain, config))
    if model.config.scalar_head:
        model.head_weight.requires_grad_(True)
    model.register_buffer(SCALE, torch.tensor(config.alpha / config.rank, dtype=torch.float64))


def freeze(model: GPT) -> None:
    """Let no weight learn, and keep matrices in the dtype that they are multiplied in, to which they are copied else.

    Norms, biases and a reward model's head stay in fp32, in which they are used.
    """
    for weight in model.requires_grad_(False).parameters():
        if weight.ndim == 2 and not (model.config.scalar_head and weight is model.head_weight):
            weight.data = weight.data.to(model.compute_dtype or weight.dtype)


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a plain model: a checkpoint's, with what its adapters add, where it has any."""
    if SCALE not in weights:
        return weights
    scale = float(weights[SCALE])
    plain = {name: weight for name, weight in weights.items() if "lora_" not in name}
    for name, a in weights.items():
        if name.endswith(".lora_a"):
            of = name.removesuffix("lora_a")
            plain[f"{of}weight"] = _merge(plain[f"{of}weight"], a, weights[f"{of}lora_b"], scale)
    return plain


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight.to(a.dtype), b, a, alpha=scale)
