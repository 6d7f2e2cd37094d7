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
        self.heads = config.heads
        # A head's keys lie together: attention reads them four times as fast as with the heads of a token together.
        # First the keys of all heads, then the values.
        shape = (config.blocks, batch, 2 * self.heads, capacity, config.head_dim)
        self.memory = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        # Where each sequence's heads begin, in rows of head_dim numbers. [B, 1, 2 H]
        self.starts = torch.arange(batch * 2 * self.heads, device=device).view(batch, 1, -1) * capacity
        # Once for all steps, of which each takes as long to ask for an angle as to multiply a small model's weights.
        positions = torch.arange(capacity, device=device)
        self.cos, self.sin = rotary_angles(positions, config.rotary_dim, config.rotary_base)
        self.reach = capacity
        self.seen = self.memory
        # Of each layer, all that `places` counts in.
        self.rows = list(self.memory.flatten(1, 3))

    def view(self, first: int, rows: int, reach: int) -> "KVCache":
        """The slots [first, first + rows) and their first `reach` tokens: the same memory, lengths too."""
        part, slots = copy.copy(self), slice(first, first + rows)
        part.reach = reach
        part.lengths, part.starts = self.lengths[slots], self.starts[slots]
        part.seen = self.memory[:, slots, :, :reach]
        return part

    def places(self, positions_BT: Tensor) -> Tensor:
        """Where the keys and values of these positions go, of every head: for `write`, computed once for all layers."""
        return (self.starts + positions_BT[:, :, None]).flatten()

    def write(self, layer: int, places: Tensor, keys_values: Tensor) -> None:
        """Put new keys and values [..., 2 H, D] of a layer where `places` says.

        Lengths do not move: every layer writes at the same place, and the caller advances them once the pass is over.
        """
        self.rows[layer].index_copy_(0, places, keys_values.reshape(-1, keys_values.shape[-1]))

    def read(self, layer: int) -> tuple[Tensor, ...]:
        """A layer's keys and its values, [B, H, reach, D] each."""
        return self.seen[layer].split(self.heads, dim=1)

    def copy(self, source: int, target: int, length: int) -> None:
        """Put the `length` tokens of one slot into another."""
        self.memory[:, target, :, :length] = self.memory[:, source, :, :length]
        self.lengths[target] = self.lengths[source]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange two slots, of which the longer holds `length` tokens."""
        held = self.memory[:, :, :, :length]
        held[:, [one, other]] = held[:, [other, one]]
        self.lengths[[one, other]] = self.lengths[[other, one]]
