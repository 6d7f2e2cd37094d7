"""The model: a pre-norm decoder-only Transformer, from token ids to loss. Reads top to bottom.

Shapes: a dense batch of tokens is [B, T]; a packed one is [N], many sequences end to end with their boundaries in
cu_seqlens. Everything but attention works on the last dimension alone, and so on either layout. Parameters stay in the
dtype they are stored in (fp32 while training); they are multiplied in `compute_dtype`.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.config import ModelConfig
from engine.errors import InputError
from engine.initial import draw
from engine.runtime import free_memory
from kernels import (
    decode_attention,
    flash_attention,
    layer_norm,
    linear_cross_entropy,
    linear_scores,
    rms_norm,
    silu_mul,
)

CPU = torch.device("cpu")


def rotary_frequencies(config: ModelConfig, device: torch.device = CPU) -> Tensor:
    """Return by how much each pair of a head's dimensions turns from one position to the next: fp32 [rotary_dim / 2].

    Scaled, for a longer context than was learnt: "linear" (Chen et al., arXiv:2306.15595) makes all slower; "llama3"
    (Grattafiori et al., arXiv:2407.21783, as transformers computes it) only what takes long for one turn.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, device=device, dtype=torch.float32) / config.rotary_dim
    frequencies = config.rotary_base**-exponents
    if config.rotary_scaling == "linear":
        frequencies = frequencies / config.rotary_factor
    elif config.rotary_scaling == "llama3":
        turns = config.rotary_original * frequencies / (2 * math.pi)
        kept = ((turns - config.rotary_low) / (config.rotary_high - config.rotary_low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / config.rotary_factor)
    return frequencies


def rotary_angles(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine of each position's rotation: fp32 [..., 1, rotary_dim] for positions [...].

    Rotary position embedding: Su et al., arXiv:2104.09864. The first half of the sine is negated, as in a rotation
    matrix, so that `rotate` can compute x * cos + swapped x * sin.
    """
    angles = positions[..., None, None].float() * rotary_frequencies(config, positions.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [..., H, D] by the angles of its positions. Halves are paired, as in GPT-NeoX."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    # The angles stay in fp32: rounded to bf16, a rotation would no longer keep lengths.
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


class NoRoomError(InputError):
    """A cache does not fit into memory; one for `most` texts at once would."""

    most = 0


def check_room(batch: int, each: int, device: torch.device = CPU) -> None:
    """Raise NoRoomError where keys and values of `batch` texts, of so many bytes each, find no room."""
    if (most := free_memory(device) // each) < batch:
        error = NoRoomError(
            f"a cache for {batch:,} texts at once takes {batch * each / 2**30:,.1f} GiB; there is room for {most:,}"
        )
        error.most = most
        raise error


class KVCache:
    """Keys and values of the tokens read so far, so that a new token costs one step and not a whole pass.

    It has `batch` slots of `capacity` tokens, allocated once: it never grows, and a pass reads a `view` of it. A
    sequence begins at position 0 of its slot, and its length (int64 `lengths` [B]) says how much of the slot is valid.
    Entries beyond the length are masked out, so a slot is used again without being set to zero.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        heads = 2 * config.kv_heads
        check_room(batch, config.cached * capacity * dtype.itemsize, torch.device(device))
        # A head's keys lie together: attention reads them four times as fast as with the heads of a token together.
        # The keys of all heads come first, then the values.
        shape = (config.blocks, batch, heads, capacity, config.head_dim)
        self.memory = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        # rows[layer] is the layer's memory as a matrix [batch * 2 * kv_heads * capacity, head_dim]: a row holds the key
        # or the value of one head for one token. starts, [batch, 1, 2 * kv_heads], is the first row of a slot and head.
        self.rows = list(self.memory.flatten(1, 3))
        self.starts = torch.arange(batch * heads, device=device).view(batch, 1, -1) * capacity
        # All angles are computed once: for a small model that takes as long as a whole step of decoding.
        positions = torch.arange(capacity, device=device)
        self.cos, self.sin = rotary_angles(positions, config)
        self.seen = self.memory  # the part of it that `read` returns; a `view` has a smaller one

    def view(self, first: int, slots: int, reach: int) -> "KVCache":
        """Return slots [first, first + slots) and their first `reach` tokens: the same memory, and the same lengths."""
        part, chosen = copy.copy(self), slice(first, first + slots)
        part.lengths, part.starts = self.lengths[chosen], self.starts[chosen]
        part.seen = self.memory[:, chosen, :, :reach]
        return part

    def rows_of(self, positions_BT: Tensor) -> Tensor:
        """Return the rows that hold keys and values of these positions, of every head. All layers have the same."""
        return (self.starts + positions_BT[:, :, None]).flatten()

    def write(self, layer: int, rows: Tensor, keys_values: Tensor) -> None:
        """Put new keys and values [..., 2 H, D] of a layer into `rows`.

        Lengths do not move: every layer writes into the same rows, and the caller advances them after the pass.
        """
        self.rows[layer].index_copy_(0, rows, keys_values.reshape(-1, keys_values.shape[-1]))

    def read(self, layer: int) -> tuple[Tensor, ...]:
        """Return a layer's keys and its values, [B, H, reach, D] each."""
        return self.seen[layer].chunk(2, dim=1)

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange two slots, of which the longer holds `length` tokens."""
        swap_rows(self.memory.transpose(0, 1)[..., :length, :], one, other)
        swap_rows(self.lengths, one, other)


def swap_rows(tensor: Tensor, one: int, other: int) -> None:
    """Exchange two rows in place. A list of indices would make the host wait for a GPU; two numbers do not."""
    kept = tensor[one].clone()
    tensor[one] = tensor[other]
    tensor[other] = kept


class Positions:
    """The positions of a batch's tokens, and so what each attends to: computed once, used by every block."""

    def __init__(
        self,
        tokens: Tensor,
        config: ModelConfig,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: KVCache | None,
    ) -> None:
        self.cu_seqlens, self.max_seqlen, self.cache = cu_seqlens, max_seqlen or config.context, cache
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        if cu_seqlens is not None:
            starts = cu_seqlens[:-1]
            positions = positions - torch.repeat_interleave(starts, cu_seqlens.diff(), output_size=tokens.shape[-1])
        elif cache is not None:
            positions = cache.lengths[:, None] + positions
            self.cache_rows, self.lengths = cache.rows_of(positions), cache.lengths + tokens.shape[-1]
            self.cos, self.sin = cache.cos[positions], cache.sin[positions]
            return
        self.cos, self.sin = rotary_angles(positions, config)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if self.cache is not None:
            self.cache.write(layer, self.cache_rows, torch.cat((k, v), dim=-2))
            keys, values = self.cache.read(layer)
            return decode_attention(q, keys.transpose(1, 2), values.transpose(1, 2), self.lengths, **options)
        if self.cu_seqlens is None:
            return flash_attention(q, k, v, **options)  # type: ignore[return-value]
        bounds, longest = self.cu_seqlens, self.max_seqlen
        return flash_attention(  # type: ignore[return-value]
            q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest, **options
        )


class Linear(nn.Linear):
    """x @ weight.T + bias in the dtype of x, whatever dtype the parameters are kept in.

    One product may hold several maps, whose outputs come one after the other: the optimizer still treats each as a map
    of its own (see train/optimizer.py).
    """

    def __init__(self, inputs: int, *outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, sum(outputs), bias=bias)
        self.outputs = outputs

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)

    def merged(self) -> Tensor:
        """Return the whole weight: here its own, and with an adapter (engine/lora.py) what that adds."""
        return self.weight


class Norm(nn.Module):
    """The fused kernel with its parameters: normalises x, or x + residual."""

    def __init__(self, kind: str, width: int, eps: float, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.kind, self.eps = kind, eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (normalised, x + residual); without a residual, (normalised, x)."""
        if self.kind == "rms":
            result = rms_norm(x, self.weight, residual=residual, eps=self.eps)
        else:
            result = layer_norm(x, self.weight, self.bias, residual=residual, eps=self.eps)
        return result if isinstance(result, tuple) else (result, x)


def norm_of(config: ModelConfig) -> Norm:
    return Norm(config.norm, config.width, config.norm_eps, bias=config.biases)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.rotary_dim = config.heads, config.kv_heads, config.rotary_dim
        self.rotates = config.kind_of(layer) != "n"
        self.options = {"window": config.window_of(layer), "softcap": config.score_cap}
        outputs, width = config.maps()["attention.qkv"]
        self.qkv = Linear(width, *outputs, bias=config.biases or config.qkv_biases)
        self.output = Linear(config.attended, config.width, bias=config.biases)
        norms = (Norm("rms", config.head_dim, config.norm_eps) if config.qk_norm else None for _ in range(2))
        self.q_norm, self.k_norm = norms

    def forward(self, x: Tensor, positions: Positions, layer: int) -> Tensor:
        both = self.heads + self.kv_heads
        qk, v = self.qkv(x).unflatten(-1, (both + self.kv_heads, -1)).split((both, self.kv_heads), dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.heads, self.kv_heads), dim=-2)
            qk = torch.cat((self.q_norm(q)[0], self.k_norm(k)[0]), dim=-2)
        if self.rotates and self.rotary_dim == qk.shape[-1]:
            qk = rotate(qk, positions.cos, positions.sin)
        elif self.rotates:
            turning, still = qk.tensor_split([self.rotary_dim], dim=-1)
            qk = torch.cat((rotate(turning, positions.cos, positions.sin), still), dim=-1)
        q, k = qk.split((self.heads, self.kv_heads), dim=-2)
        attended = positions.attend(layer, q, k, v, **self.options)
        return self.output(attended.flatten(-2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = silu_mul if config.mlp == "gated" else F.gelu
        outputs, width = config.maps()["mlp.expand"]
        self.expand = Linear(width, *outputs, bias=config.biases)
        self.contract = Linear(config.mlp_columns, width, bias=config.biases)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.activation(self.expand(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    The norm's kernel also does the residual addition, so each addition is left to the norm that follows: a block
    takes and returns (branch, residual), whose sum is x. With a parallel residual (GPT-NeoX) it computes
    x + attention(norm(x)) + mlp(other norm(x)) at once.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.attention_norm = norm_of(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = norm_of(config)
        self.mlp = MLP(config)

    def forward(
        self, branch: Tensor, residual: Tensor | None, positions: Positions, layer: int
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm(branch, residual)
        if self.parallel:
            return self.attention(x, positions, layer) + self.mlp(self.mlp_norm(residual)[0]), residual
        x, residual = self.mlp_norm(self.attention(x, positions, layer), residual)
        return self.mlp(x), residual


class GPT(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.decode_int8 = False  # see engine/native.py
        self.checkpoint_activations = False  # see LoopConfig
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.blocks))
        self.final_norm = norm_of(config)
        self.head = Linear(config.width, config.outputs) if config.own_head else None
        draw(self, config)

    @property
    def head_weight(self) -> Tensor:
        """The matrix that gives scores, [V, C]: the head's own, or the embedding."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return hidden states after the last norm, [..., C], in the compute dtype.

        tokens: int64 [B, T]; or [N] with cu_seqlens int32 [sequences + 1], sequences no longer than max_seqlen (by
        default the context). With a cache, [B, T] continues what the cache holds; the caller advances the cache
        afterwards.
        """
        positions = Positions(tokens, self.config, cu_seqlens, max_seqlen, cache)
        branch = self.embedding(tokens)
        branch = branch.to(self.compute_dtype or branch.dtype)
        residual = None
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                branch, residual = checkpoint(block, branch, residual, positions, layer, use_reentrant=False)
            else:
                branch, residual = block(branch, residual, positions, layer)
        hidden: Tensor = self.final_norm(branch, residual)[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores of every token as the next one: [..., V], fp32."""
        return linear_scores(hidden, self.head_weight)

    def loss(
        self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """Return the sum of the cross-entropy over the targets (-100 does not count), in nats. fp32, no dimensions."""
        hidden = self(tokens, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return linear_cross_entropy(hidden, self.head_weight, targets, reduction="sum")
