"""CUDA graphs of a decoding step: one launch for all of its kernels, which at small batches take longer to launch than
to run. A graph has a fixed batch, so there is one for each of a few sizes, and a batch in between is padded.
"""

import torch
from torch import Tensor

from engine.cache import KVCache
from engine.model import GPT


class DecodeGraphs:
    """Of a model over the first slots of a cache, whose lengths, and `last`, the tokens to read, stay on the device."""

    def __init__(self, model: GPT, cache: KVCache, last: Tensor) -> None:
        self.model, self.cache, self.last = model, cache, last
        slots = len(last)
        self.sizes = [*(2**power for power in range((slots - 1).bit_length())), slots]
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def logits(self, rows: int) -> Tensor:
        """[rows, V] of the next tokens, until the next call. Lengths do not move: the caller advances them."""
        size = next(size for size in self.sizes if size >= rows)
        return self._run(size)[:rows]

    def _run(self, size: int) -> Tensor:
        if size not in self.graphs:
            self.graphs[size] = self._capture(size)
        graph, logits = self.graphs[size]
        graph.replay()
        return logits

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Compiles the kernels and warms the libraries up, which a capture does not allow. Twice is as good as once: the
        # keys and values go to the same places.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._pass(size)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=next((each.pool() for each, _ in self.graphs.values()), None)):
            logits = self._pass(size)
        return graph, logits

    def _pass(self, size: int) -> Tensor:
        # A row of padding reads some token at the end of a slot that is free, or whose prompt is still being read: it
        # writes where the next chunk of the prompt will write.
        view = self.cache.view(0, size, self.cache.reach)
        return self.model.logits(self.model(self.last[:size, None], cache=view)[:, -1])
