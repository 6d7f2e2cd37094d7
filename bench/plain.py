"""The peers: attention, LayerNorm, loss and a GPT as they are plainly written in PyTorch.

The GPT has the shape and number of matrix parameters of ours; learned positions, every row attended as one sequence.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, T, D] to causal attention's output
sdpa: Attend = partial(F.scaled_dot_product_attention, is_causal=True)


def future(length: int, device: torch.device) -> Tensor:
    """Return the mask of what causal attention must not see, [T, T]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Attention that holds the matrix of scores; [..., T, D] with the mask of what is hidden, [T, S]."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, future(q.shape[-2], q.device))


def norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, *, function: Callable[..., Tensor] = F.layer_norm
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the norm of x; with a residual stream that of the sum, and the sum."""
    if residual is None:
        return function(x, weight.shape, weight, eps=1e-5)
    summed = x + residual
    return function(summed, weight.shape, weight, eps=1e-5), summed


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The softmax in fp32, as autocast has it."""
    return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)).float(), targets)


def half_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute all in the precision of the products: in half, less memory and time for a loss of three digits."""
    return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)), targets)


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        width = config.width
        self.heads, self.attend = config.heads, attend
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        expand, contract = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.mlp = nn.Sequential(nn.LayerNorm(width, bias=False), expand, nn.GELU(), contract)

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, length, width = x_BTC.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x_BTC)).split(width, dim=-1)
        )
        x_BTC = x_BTC + self.output(self.attend(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return x_BTC + self.mlp(x_BTC)


class PlainGPT(nn.Module):
    def __init__(self, config: ModelConfig, attend: Attend = sdpa) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(PlainBlock(config, attend) for _ in range(config.blocks)))
        self.final_norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                residual = name.endswith(("output.weight", "mlp.3.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * config.blocks) if residual else 1))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.embedding(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        return self.head(self.final_norm(self.blocks(x_BTC)))

    def loss(self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        """Return the sum of the loss over packed sequences, one by one: what evaluation asks of any model."""
        losses = [
            F.cross_entropy(self(tokens[None, start:end])[0], targets[start:end], reduction="sum")
            for start, end in pairwise(cu_seqlens.tolist())
        ]
        return torch.stack(losses).sum()


def row_loss(model: Callable[[Tensor], Tensor], tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens_BT).flatten(0, 1), targets_BT.flatten())


def optimizer(model: nn.Module, rate: float = 1e-3) -> torch.optim.AdamW:
    """Return AdamW with nanoGPT's settings: matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
