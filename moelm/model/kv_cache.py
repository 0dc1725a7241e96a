"""The key/value cache of incremental decoding.

Shapes: B rows, T new positions, S positions so far, G key/value heads, C head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moelm.config import ModelConfig
from moelm.model.rope import rope_tables


class KVCache:
    """Preallocated keys and values of every layer.

    Args:
        capacity: maximum number of positions.
        starts_B: first real position of each row, for prompts padded on the left.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, device: torch.device, starts_B: Tensor | None = None
    ) -> None:
        shape = (batch, config.kv_heads, capacity, config.size_per_head)
        self.layers = [
            (torch.empty(shape, device=device), torch.empty(shape, device=device)) for _ in range(config.num_layers)
        ]
        self.rope = rope_tables(torch.arange(capacity, device=device), config)
        self.length = 0
        self.starts_B = starts_B

    def advance(self, positions: int) -> None:
        """Count positions that every layer has appended."""
        self.length += positions


class LayerCache(NamedTuple):
    """One layer's part of a cache."""

    cache: KVCache
    layer: int

    def append(self, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return all of them; `KVCache.advance` is called after the last layer."""
        length, new = self.cache.length, k_BGTC.shape[2]
        stored = []
        for memory, latest in zip(self.cache.layers[self.layer], (k_BGTC, v_BGTC), strict=True):
            memory.narrow(2, length, new).copy_(latest)
            stored.append(memory.narrow(2, 0, length + new).to(latest.dtype))
        return stored[0], stored[1]
