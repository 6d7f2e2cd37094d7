"""One decoding step: scores of the next token for all sequences that produce tokens, in one of three ways.

`Decoder` calls the model. At small sizes the host needs longer for that than the device, so on a GPU DecodeGraphs
replays the whole step as one launch, and on a CPU the whole step is one compiled function (engine/native.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.model import GPT, KVCache
from engine.sampling import Sampling
from kernels.backend import backend


class Ending(NamedTuple):
    """The end of a prompt: what is known from there on of how to continue it."""

    prompt: Sequence[int]
    sampling: Sampling
    generator: torch.Generator
    stop_ids: frozenset[int]
    logprob: bool
    generated: int = 0  # tokens of the prompt, the last ones, that were generated


class Reading(NamedTuple):
    """A part of a prompt: token ids, the slot of the cache, the position of the first, and the end if it is there."""

    tokens: Sequence[int]
    slot: int
    position: int
    ending: Ending | None


def make_decoder(model: GPT, cache: KVCache, last: Tensor, *, graphs: bool | None) -> "Decoder":
    """Return a decoder that calls the model. `graphs` None: by CUDA graphs where our kernels run on a GPU."""
    if last.is_cuda and backend(last.device) == "triton" if graphs is None else graphs:
        return DecodeGraphs(model, cache, last)
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
