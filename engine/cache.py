"""The KV cache: keys and values of the tokens seen so far, so that a new token costs one step and not a whole pass."""

import copy

import torch
from torch import Tensor

from engine.config import ModelConfig


class KVCache:
    """Room for `capacity` tokens of `batch` sequences, each with a length of its own. lengths: int64 [B]."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.blocks, batch, capacity, config.heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    def write(self, layer: int, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """Put the keys and values of T new tokens behind what each sequence holds; returns the layer's whole cache.

        Lengths do not move: every layer writes at the same place, and the caller advances them once the pass is over.
        """
        batch, new = k_BTHD.shape[:2]
        rows = torch.arange(batch, device=k_BTHD.device)[:, None]
        places = self.lengths[:, None] + torch.arange(new, device=k_BTHD.device)
        self.keys[layer].index_put_((rows, places), k_BTHD)
        self.values[layer].index_put_((rows, places), v_BTHD)
        return self.keys[layer], self.values[layer]

    def view(self, first: int, rows: int, reach: int) -> "KVCache":
        """The slots [first, first + rows) and their first `reach` tokens: the same memory, lengths too."""
        part = copy.copy(self)
        slots = slice(first, first + rows)
        part.keys, part.values = self.keys[:, slots, :reach], self.values[:, slots, :reach]
        part.lengths = self.lengths[slots]
        return part

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange two slots, of which the longer holds `length` tokens."""
        for tensor in (self.keys[:, :, :length], self.values[:, :, :length]):
            tensor[:, [one, other]] = tensor[:, [other, one]]
        self.lengths[[one, other]] = self.lengths[[other, one]]
