"""The model: a pre-norm decoder-only Transformer, from token ids to loss. Reads top to bottom.

Shapes: a dense batch of tokens is [B, T]; a packed one is [N], many sequences end to end with their boundaries in
cu_seqlens. Everything but attention works on the last dimension and does not care which. Parameters stay in the dtype
they are stored in (fp32 while training); `compute_dtype` is what they are multiplied in.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.cache import KVCache
from engine.config import ModelConfig
from engine.rotary import rotary_angles, rotate
from kernels import decode_attention, flash_attention, layer_norm, linear_cross_entropy, linear_scores


class Linear(nn.Linear):
    """x @ weight.T + bias in the dtype of x, whatever dtype the parameters are kept in."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype == input.dtype:
            return F.linear(input, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class LayerNorm(nn.Module):
    """The fused kernel with its parameters: normalises x, or x + residual (then returns the sum as well)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.width))
        self.bias = nn.Parameter(torch.zeros(config.width)) if config.biases else None
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)  # type: ignore[return-value]

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normalised, x + residual); without a residual, (normalised, x)."""
        if residual is None:
            return self(x), x
        return layer_norm(x, self.weight, self.bias, residual=residual, eps=self.eps)  # type: ignore[return-value]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.rotary_dim = config.heads, config.rotary_dim
        # Query, key and value in one product. The optimizer still treats them as three maps (see train/optimizer.py).
        self.qkv = Linear(config.width, 3 * config.width, bias=config.biases)
        self.output = Linear(config.width, config.width, bias=config.biases)

    def forward(self, x: Tensor, places: "Places", layer: int) -> Tensor:
        qk, v = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).split((2 * self.heads, self.heads), dim=-2)
        if self.rotary_dim == qk.shape[-1]:
            qk = rotate(qk, places.cos, places.sin)
        else:
            turning, still = qk.tensor_split([self.rotary_dim], dim=-1)
            qk = torch.cat((rotate(turning, places.cos, places.sin), still), dim=-1)
        q, k = qk.chunk(2, dim=-2)
        return self.output(places.attend(layer, q, k, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.expand = Linear(config.width, 4 * config.width, bias=config.biases)
        self.contract = Linear(4 * config.width, config.width, bias=config.biases)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Each addition is left to the norm that follows, which fuses it.

    With a parallel residual, x + attention(norm(x)) + mlp(other norm(x)) in one go.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.attention_norm = LayerNorm(config)
        self.attention = Attention(config)
        self.mlp_norm = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, branch: Tensor, residual: Tensor | None, places: "Places", layer: int) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm.add(branch, residual)
        if self.parallel:
            return self.attention(x, places, layer) + self.mlp(self.mlp_norm(residual)), residual
        x, residual = self.mlp_norm.add(self.attention(x, places, layer), residual)
        return self.mlp(x), residual


class Places:
    """Where the tokens of a batch stand, and so what each attends to: computed once, used by every block."""

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
            self.cache_places, self.lengths = cache.places(positions), cache.lengths + tokens.shape[-1]
            self.cos, self.sin = cache.cos[positions], cache.sin[positions]
            return
        self.cos, self.sin = rotary_angles(positions, config.rotary_dim, config.rotary_base)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cache is not None:
            self.cache.write(layer, self.cache_places, torch.cat((k, v), dim=-2))
            keys, values = self.cache.read(layer)
            return decode_attention(q, keys.transpose(1, 2), values.transpose(1, 2), self.lengths)
        if self.cu_seqlens is None:
            return flash_attention(q, k, v)  # type: ignore[return-value]
        return flash_attention(  # type: ignore[return-value]
            q,
            k,
            v,
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_k=self.cu_seqlens,
            max_seqlen_q=self.max_seqlen,
            max_seqlen_k=self.max_seqlen,
        )


class GPT(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.decode_int8 = False  # see engine/cpu_decode.py
        self.checkpoint_activations = False  # see LoopConfig
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.final_norm = LayerNorm(config)
        self.head = Linear(config.width, config.outputs, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal with standard deviation 0.02 (GPT-2); what writes to the residual stream is scaled by depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            if parameter.ndim < 2:
                continue
            writes_to_residual = name.endswith(("attention.output.weight", "mlp.contract.weight"))
            depth = math.sqrt(2 * self.config.blocks) if writes_to_residual else 1.0
            parameter.normal_(std=0.02 / depth)

    def forward(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [..., C], in the compute dtype.

        tokens: int64 [B, T]; or [N] with cu_seqlens int32 [sequences + 1], sequences no longer than max_seqlen (by
        default the context). With a cache, [B, T] continues what the cache holds; the caller advances the cache
        afterwards.
        """
        places = Places(tokens, self.config, cu_seqlens, max_seqlen, cache)
        branch = self.embedding(tokens)
        branch = branch.to(self.compute_dtype or branch.dtype)
        residual = None
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                branch, residual = checkpoint(block, branch, residual, places, layer, use_reentrant=False)
            else:
                branch, residual = block(branch, residual, places, layer)
        return self.final_norm.add(branch, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every piece as the next token: [..., V], fp32."""
        return linear_scores(hidden, self.head.weight)

    def loss(
        self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """Sum over the targets (-100 does not count) of the cross-entropy in nats. fp32, no dimensions."""
        hidden = self(tokens, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return linear_cross_entropy(hidden, self.head.weight, targets, reduction="sum")
