"""The KV cache: keys and values of the tokens seen so far, so that a new token costs one step and not a whole pass."""

import copy

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.rotary import rotary_angles


class KVCache:
    """Room for `capacity` tokens of `batch` sequences, each with a length of its own. lengths: int64 [B]."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        # A head's keys lie together: attention reads them four times as fast as with the heads of a token together.
        shape = (config.blocks, batch, config.heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        # Where each sequence's heads begin, in rows of head_dim numbers. [B, 1, H]
        self.starts = torch.arange(batch * config.heads, device=device).view(batch, 1, -1) * capacity
        # Once for all steps, of which each takes as long to ask for an angle as to multiply a small model's weights.
        positions = torch.arange(capacity, device=device)
        self.cos, self.sin = rotary_angles(positions, config.rotary_dim, config.rotary_base)
        self.reach = capacity
        self.seen_keys, self.seen_values = self.keys.transpose(2, 3), self.values.transpose(2, 3)

    def view(self, first: int, rows: int, reach: int) -> "KVCache":
        """The slots [first, first + rows) and their first `reach` tokens: the same memory, lengths too."""
        part, slots = copy.copy(self), slice(first, first + rows)
        part.reach = reach
        part.lengths, part.starts = self.lengths[slots], self.starts[slots]
        part.seen_keys, part.seen_values = self.seen_keys[:, slots, :reach], self.seen_values[:, slots, :reach]
        return part

    def places(self, positions_BT: Tensor) -> Tensor:
        """Where the keys and values of these positions go, of every head: for `write`, computed once for all layers."""
        return (self.starts + positions_BT[:, :, None]).flatten()

    def write(self, layer: int, places: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values where `places` says; returns the layer's keys and values, [B, reach, H, D].

        Lengths do not move: every layer writes at the same place, and the caller advances them once the pass is over.
        """
        for cache, new in ((self.keys, k_BTHD), (self.values, v_BTHD)):
            cache[layer].view(-1, cache.shape[-1]).index_copy_(0, places, new.reshape(-1, cache.shape[-1]))
        return self.seen_keys[layer], self.seen_values[layer]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange two slots, of which the longer holds `length` tokens."""
        for tensor in (self.keys[:, :, :, :length], self.values[:, :, :, :length]):
            tensor[:, [one, other]] = tensor[:, [other, one]]
        self.lengths[[one, other]] = self.lengths[[other, one]]
