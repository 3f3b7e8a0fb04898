"""The keys and values of what a decoder has read, so that each new token costs one step."""

from __future__ import annotations

import torch
from torch import Tensor

from lexmill.errors import ModelError
from lexmill.model.config import ModelConfig


class LayerCache:
    """Keys and values of one layer, each (rows, kv_heads, room, head_width); grows by doubling."""

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype) -> None:
        self._shape = (rows, config.kv_heads, 0, config.head_width)
        self.keys = torch.zeros(self._shape, dtype=dtype)
        self.values = torch.zeros(self._shape, dtype=dtype)

    def append(self, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Add (rows, kv_heads, new, head_width) behind `length` tokens; returns all, as views."""
        end = length + keys.shape[2]
        if end > self.keys.shape[2]:
            room = max(64, end, 2 * self.keys.shape[2])
            self.keys, self.values = (self._grown(old, room, length) for old in (self.keys, self.values))
        self.keys[:, :, length:end] = keys
        self.values[:, :, length:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grown(self, old: Tensor, room: int, length: int) -> Tensor:
        rows, heads, _, width = self._shape
        new = torch.zeros((rows, heads, room, width), dtype=old.dtype)
        new[:, :, :length] = old[:, :, :length]
        return new


class Cache:
    """What a batch of sequences has read so far.

    Rows whose prompts differ in length are padded on the left; `padding[row]` says by how much,
    and that many positions at the start of the row are never attended to.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int = 1,
        padding: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.length = 0
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self.layers = [LayerCache(config, rows, dtype) for _ in range(config.layers)]

    def positions(self, new: int) -> Tensor:
        """Positions of the next `new` tokens: (rows or 1, new). Padding counts as position 0.

        Raises:
            ModelError: they lie beyond the model's context.
        """
        if self.length + new > self.config.context:
            raise ModelError(
                f"The text would be {self.length + new:,} tokens long, but the model's context is {self.config.context:,}.",
                "Shorten the prompt or ask for fewer tokens.",
            )
        positions = torch.arange(self.length, self.length + new)[None]
        return positions if self.padding is None else (positions - self.padding[:, None]).clamp(min=0)

    def mask(self, new: int) -> Tensor | None:
        """Who may look at whom: (rows or 1, 1, new, length + new), True where it may; None when all may."""
        if new == 1 and self.padding is None:
            return None
        total = self.length + new
        query = torch.arange(self.length, total)[:, None]
        key = torch.arange(total)[None, :]
        allowed = (key <= query)[None]
        if self.padding is not None:
            # a padding position may look at itself: a row without any key would be undefined
            allowed = allowed & ((key >= self.padding[:, None, None]) | (key == query))
        return allowed[:, None]
