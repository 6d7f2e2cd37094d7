"""A decoding step on a CPU, where at small sizes the host's own work takes longer than the model's.

The operations of engine/model.py for one new token per sequence, flat: no modules, additions fused into the products
that follow them, masks and places computed once for all blocks. It offers what engine/graphs.py offers on a GPU.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.cache import KVCache
from engine.model import GPT, Block
from engine.rotary import rotate
from kernels import linear_scores


class CpuDecoder:
    """Of a model over the first slots of a cache. `last` holds the tokens to read.

    Weights are shared, or with model.decode_int8 held once more in int8.
    """

    def __init__(self, model: GPT, cache: KVCache, last: Tensor) -> None:
        self.model, self.cache, self.last = model, cache, last
        self.mm: Any
        self.addmm: Any
        self.mm, self.addmm = (int8_mm, int8_addmm) if model.decode_int8 else (torch.mm, torch.addmm)
        held: Any = quantise if model.decode_int8 else Tensor.t
        self.blocks = [[each if each.ndim == 1 else held(each) for each in _weights(block)] for block in model.blocks]
        self.head = quantise(model.head.weight) if model.decode_int8 else None

    @staticmethod
    def knows(model: GPT) -> bool:
        """Whether this is a model of ours, on a CPU, in the dtype that it is stored in."""
        config, weight = model.config, model.embedding.weight
        ours = not config.biases and not config.parallel_residual and config.rotary_share == 1
        return ours and weight.device.type == "cpu" and model.compute_dtype in (None, weight.dtype)

    def logits(self, rows: int) -> Tensor:
        """[rows, V] of the next tokens, fp32. Lengths do not move: the caller advances them."""
        config, lengths = self.model.config, self.cache.lengths[:rows]
        heads, shape, eps = config.heads, (config.width,), config.norm_eps
        known = lengths.tolist()
        view = self.cache.view(0, rows, max(known) + 1)
        places = view.places(lengths[:, None])
        cos, sin = view.cos[lengths], view.sin[lengths]
        x = F.embedding(self.last[:rows], self.model.embedding.weight)
        mask = None
        if min(known) != max(known):
            hidden = torch.arange(view.reach) > lengths[:, None, None, None]
            mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill_(hidden, float("-inf"))
        for layer, (attention_norm, qkv, output, mlp_norm, expand, contract) in enumerate(self.blocks):
            normed = torch.layer_norm(x, shape, attention_norm, None, eps)
            qkv_BHD = self.mm(normed, qkv).view(rows, 3 * heads, -1)
            qk = qkv_BHD[:, : 2 * heads]
            qk.copy_(rotate(qk, cos, sin))
            view.write(layer, places, qkv_BHD[:, heads:])
            keys, values = view.read(layer)
            attended = F.scaled_dot_product_attention(qkv_BHD[:, :heads, None], keys, values, attn_mask=mask)
            x = self.addmm(x, attended.view(rows, -1), output)
            normed = torch.layer_norm(x, shape, mlp_norm, None, eps)
            x = self.addmm(x, F.gelu(self.mm(normed, expand)), contract)
        normed = torch.layer_norm(x, shape, self.model.final_norm.weight, None, eps)
        # In int8 the weights are rounded by more than these scores.
        return int8_mm(normed, self.head) if self.head else linear_scores(normed, self.model.head.weight)


class Int8(NamedTuple):
    """A weight [N, K] in a quarter of its bytes: at small batches a step takes as long as its weights take to read."""

    values: Tensor  # int8 [N, K]
    scales: Tensor  # bf16 [N]: what 1 stands for in each row


def quantise(weight: Tensor) -> Int8:
    scales = (weight.abs().amax(dim=1).float() / 127).clamp(min=1e-12).bfloat16()
    return Int8((weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales)


def int8_mm(x: Tensor, weight: Int8) -> Tensor:
    # PyTorch's kernel of weight-only quantisation (what torchao calls too); it takes x in bf16, and sums in fp32.
    return torch._weight_int8pack_mm(x.bfloat16(), weight.values, weight.scales).to(x.dtype)


def int8_addmm(added: Tensor, x: Tensor, weight: Int8) -> Tensor:
    return added + int8_mm(x, weight)


def _weights(block: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert isinstance(block, Block)
    attention, mlp = block.attention, block.mlp
    return (
        block.attention_norm.weight,
        attention.qkv.weight,
        attention.output.weight,
        block.mlp_norm.weight,
        mlp.expand.weight,
        mlp.contract.weight,
    )
