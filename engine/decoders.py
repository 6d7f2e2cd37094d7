"""One decoding step: scores of the next token for all sequences that produce tokens, in one of three ways.

`Decoder` calls the model. At small sizes the host needs longer for that than the device, so on a GPU DecodeGraphs
replays the whole step as one launch, and on a CPU CpuDecoder computes the same without the model's modules.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import InputError
from engine.model import GPT, KVCache, rotate
from kernels import linear_scores
from kernels.backend import backend


def make_decoder(model: GPT, cache: KVCache, last: Tensor, *, graphs: bool | None) -> "Decoder":
    """Return the fastest decoder for this model where it is. `graphs` None: CUDA graphs where our kernels run on a GPU.

    Raises InputError for a model that is to be decoded in int8 and cannot be.
    """
    if last.is_cuda and backend(last.device) == "triton" if graphs is None else graphs:
        return DecodeGraphs(model, cache, last)
    if CpuDecoder.supports(model):
        return CpuDecoder(model, cache, last)
    if model.decode_int8:
        raise InputError("int8 is not there for a model with biases, parallel residual or partial rotary positions")
    return Decoder(model, cache, last)


class Decoder:
    """A model over the first slots of a cache. `last` int64 [slots] holds the token that each slot reads next."""

    def __init__(self, model: GPT, cache: KVCache, last: Tensor) -> None:
        self.model, self.cache, self.last = model, cache, last

    def logits(self, rows: int, reach: int) -> Tensor:
        """Return scores [rows, V] in fp32, valid until the next call. The longest of these slots then holds `reach`.

        The lengths of the cache do not move: the caller advances them.
        """
        view = self.cache.view(0, rows, reach)
        return self.model.logits(self.model(self.last[:rows, None], cache=view)[:, -1])


class DecodeGraphs(Decoder):
    """The step as a CUDA graph: one launch for all kernels, which at small batches take longer to launch than to run.

    A graph replays fixed shapes and addresses. So there is one for each of a few sizes of batch, every one reaches over
    the whole cache (a slot's length masks the rest), and what changes from step to step stays on the device.
    """

    def __init__(self, model: GPT, cache: KVCache, last: Tensor) -> None:
        super().__init__(model, cache, last)
        slots = len(last)
        self.sizes = [*(2**power for power in range((slots - 1).bit_length())), slots]
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def logits(self, rows: int, reach: int) -> Tensor:
        # A batch between two sizes is padded. A row of padding reads some token at the end of a slot that is free, or
        # whose prompt is still being read: it writes where the next chunk of the prompt will write.
        size = next(size for size in self.sizes if size >= rows)
        return self.replay(size)[:rows]

    def replay(self, size: int) -> Tensor:
        if size not in self.graphs:
            self.graphs[size] = self._capture(size)
        graph, logits = self.graphs[size]
        graph.replay()
        return logits

    def run(self, size: int) -> Tensor:
        """What a graph of this size does."""
        return super().logits(size, self.cache.capacity)

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # A server decodes in a thread of its own, whose current device is another than that of the main thread.
        with torch.cuda.device(self.last.device):
            return self._capture_here(size)

    def _capture_here(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # The first run, on a stream of its own, compiles the kernels and warms the libraries up, which a capture does
        # not allow. To run it twice does no harm: keys and values go to the same rows of the cache.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.run(size)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=next((each.pool() for each, _ in self.graphs.values()), None)):
            logits = self.run(size)
        return graph, logits


# The weights of a block in the order in which CpuDecoder takes them.
WEIGHTS = ("attention_norm", "attention.qkv", "attention.output", "mlp_norm", "mlp.expand", "mlp.contract")


class CpuDecoder(Decoder):
    """The operations of engine/model.py for one new token per sequence, flat: additions fused into the products that
    follow them, mask and positions computed once for all blocks.

    Weights are shared with the model, or with model.decode_int8 held once more in int8.
    """

    def __init__(self, model: GPT, cache: KVCache, last: Tensor) -> None:
        super().__init__(model, cache, last)
        hold: Any = quantise if model.decode_int8 else Tensor.t
        self.mm: Any = int8_mm if model.decode_int8 else torch.mm
        self.addmm: Any = int8_addmm if model.decode_int8 else torch.addmm
        weights = [[block.get_parameter(f"{name}.weight") for name in WEIGHTS] for block in model.blocks]
        self.blocks = [[each if each.ndim == 1 else hold(each) for each in block] for block in weights]
        self.head = quantise(model.head.weight) if model.decode_int8 else None

    @staticmethod
    def supports(model: GPT) -> bool:
        """Return whether it is a model of our own kind, on a CPU, in the dtype that it is stored in."""
        config, weight = model.config, model.embedding.weight
        ours = not config.biases and not config.parallel_residual and config.rotary_share == 1
        return ours and weight.device.type == "cpu" and model.compute_dtype in (None, weight.dtype)

    def logits(self, rows: int, reach: int) -> Tensor:
        asked, rows = rows, self.padded(rows)
        config, lengths = self.model.config, self.cache.lengths[:rows]
        heads, shape, eps = config.heads, (config.width,), config.norm_eps
        view = self.cache.view(0, rows, reach)
        cache_rows = view.rows_of(lengths[:, None])
        cos, sin = view.cos[lengths], view.sin[lengths]
        x = F.embedding(self.last[:rows], self.model.embedding.weight)
        mask = None
        if len(set(lengths.tolist())) > 1:
            hidden = torch.arange(reach) > lengths[:, None, None, None]
            mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill_(hidden, float("-inf"))
        for layer, (attention_norm, qkv, output, mlp_norm, expand, contract) in enumerate(self.blocks):
            normed = torch.layer_norm(x, shape, attention_norm, None, eps)
            qkv_BHD = self.mm(normed, qkv).view(rows, 3 * heads, -1)
            qk = qkv_BHD[:, : 2 * heads]
            qk.copy_(rotate(qk, cos, sin))
            view.write(layer, cache_rows, qkv_BHD[:, heads:])
            keys, values = view.read(layer)
            attended = F.scaled_dot_product_attention(qkv_BHD[:, :heads, None], keys, values, attn_mask=mask)
            x = self.addmm(x, attended.view(rows, -1), output)
            normed = torch.layer_norm(x, shape, mlp_norm, None, eps)
            x = self.addmm(x, F.gelu(self.mm(normed, expand)), contract)
        normed = torch.layer_norm(x, shape, self.model.final_norm.weight, None, eps)
        normed = normed[:asked]
        # In int8 the weights are rounded by more than these scores.
        return int8_mm(normed, self.head) if self.head else linear_scores(normed, self.model.head.weight)

    def padded(self, rows: int) -> int:
        """Return how many rows are computed. The padding does no more harm than that of DecodeGraphs.

        For every number of rows oneDNN compiles each product in bf16 anew, and keeps it: 0.6 MiB for each.
        """
        if self.model.embedding.weight.dtype == torch.float32:
            return rows
        return min(1 << (rows - 1).bit_length() if rows < 8 else -(-rows // 8) * 8, len(self.last))


class Int8(NamedTuple):
    """A weight [N, K] in a quarter of its bytes: at small batches a step takes as long as its weights take to read.

    Each row has a scale of its own, so that one large row does not cost the others their digits.
    """

    values: Tensor  # int8 [N, K]
    scales: Tensor  # bf16 [N]: what 1 stands for in each row


def quantise(weight: Tensor) -> Int8:
    """Round a weight to int8, each row by its largest number."""
    scales = (weight.abs().amax(dim=1).float() / 127).clamp(min=1e-12).bfloat16()
    return Int8((weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales)


def int8_mm(x: Tensor, weight: Int8) -> Tensor:
    # PyTorch's kernel of weight-only quantisation (what torchao calls too); it takes x in bf16, and sums in fp32.
    return torch._weight_int8pack_mm(x.bfloat16(), weight.values, weight.scales).to(x.dtype)


def int8_addmm(added: Tensor, x: Tensor, weight: Int8) -> Tensor:
    return added + int8_mm(x, weight)
