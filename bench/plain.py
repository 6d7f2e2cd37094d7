"""The peer: a GPT as it is plainly written in PyTorch. SDPA, full logits, fused AdamW.

Same shape and number of matrix parameters as ours; learned positions, every row attended as one sequence.
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


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that holds the matrix of scores."""
    hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1) @ v


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        width = config.width
        self.heads, self.attend = config.heads, attend
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, length, width = x_BTC.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x_BTC)).split(width, dim=-1)
        )
        x_BTC = x_BTC + self.output(self.attend(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return x_BTC + self.contract(F.gelu(self.expand(self.mlp_norm(x_BTC))))


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
                residual = name.endswith(("output.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * config.blocks) if residual else 1))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.embedding(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        return self.head(self.final_norm(self.blocks(x_BTC)))

    def row_loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean loss of whole rows."""
        return F.cross_entropy(self(tokens_BT).flatten(0, 1), targets_BT.flatten())

    def loss(self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        """Sum of the loss of packed sequences, one by one: what evaluation asks of any model."""
        losses = [
            F.cross_entropy(self(tokens[None, start:end])[0], targets[start:end], reduction="sum")
            for start, end in pairwise(cu_seqlens.tolist())
        ]
        return torch.stack(losses).sum()


def plain_optimizer(model: nn.Module, rate: float = 1e-3) -> torch.optim.AdamW:
    """nanoGPT's settings: matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
