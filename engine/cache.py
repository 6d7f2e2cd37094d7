"""The KV cache: keys and values of the tokens seen so far, so that a new token costs one step and not a whole pass."""

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
