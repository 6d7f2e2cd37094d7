"""How weights are drawn before a model has learnt anything."""

import math
from typing import Any

import torch

from engine.config import ModelConfig

# Standard deviation of weights: in every matrix (GPT-2), or times the root of its inputs, so that what comes out of a
# map has the same size at every width. For nano both are about the same.
GPT2, SCALED = 0.02, 0.25
# How far before itself each head looks, in the first two blocks; the others find out by themselves.
DISTANCES = ((1, 2, 3), (1, 2))
# The share of an embedding that all tokens have in common, and of a looking head's queries and keys that they do not.
COMMON, OWN = 0.5, 0.3
# The fastest rotations of a head, which tell one position from the next.
FASTEST = 5


@torch.no_grad()
def draw(model: Any, config: ModelConfig) -> None:
    """Draw the weights of a GPT: norms 1, biases 0, and matrices as `config.start` says.

    What writes to the residual stream is smaller in deep models (GPT-2).
    """
    local = config.start == "local"
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 2:
            writes = name.endswith(("attention.output.weight", "mlp.contract.weight"))
            scaled = local and name.startswith("blocks.")
            std = SCALED / math.sqrt(parameter.shape[1]) if scaled else GPT2
            parameter.normal_(std=std / (math.sqrt(2 * config.blocks) if writes else 1.0))
    if local:
        _look_back(model, config)


def _look_back(model: Any, config: ModelConfig) -> None:
    """Make some heads attend to the token before, or one of the two before that, from the first step on.

    Heads of trained models often do, and then need not find it out. (Trockman and Kolter, arXiv:2305.09828, begin with
    what attention learns in another way.) All embeddings get a part in common. From it such a head makes queries and
    keys that are the same for all tokens; their angle is such that rotary positions turn them onto each other at the
    distance.
    """
    width, size, keys = config.width, config.head_dim, config.kv_heads
    device = model.embedding.weight.device
    common = torch.randn(width, device=device)
    common -= common.mean()  # as LayerNorm does
    common /= common.norm()
    for table in (model.embedding, model.head):
        if table is not None:
            table.weight.sub_(torch.outer(table.weight @ common, common))
    model.embedding.weight.add_(COMMON * GPT2 * math.sqrt(width) * common)
    # What a norm leaves of the common part.
    left = math.sqrt(width) * COMMON / math.hypot(1, COMMON)
    turns = min(FASTEST, config.rotary_dim // 2)
    frequencies = config.rotary_base ** (-torch.arange(turns, device=device) * 2 / config.rotary_dim)
    for block, distances in zip(model.blocks, DISTANCES, strict=False):
        heads = block.attention.qkv.weight[: (config.heads + keys) * size].unflatten(0, (-1, size))
        for head, distance in enumerate(distances[: config.heads - 1]):
            angles = distance * frequencies
            query, key = torch.zeros(2, 2, config.rotary_dim // 2, device=device)
            query[0, :turns], query[1, :turns], key[0, :turns] = angles.cos(), -angles.sin(), 1.0
            for number, vector in ((head, query), (config.heads + head * keys // config.heads, key)):
                rows = torch.randn(size, width, device=device) * OWN / math.sqrt(width)
                rows -= torch.outer(rows @ common, common)
                rows[: config.rotary_dim] += torch.outer(vector.flatten() * math.sqrt(size / turns), common) / left
                heads[number] = rows
