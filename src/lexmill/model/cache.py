"""The keys and values of what a decoder has read, so that each new token costs one step."""

from __future__ import annotations

import torch
from torch import Tensor

from lexmill.errors import ModelError
from lexmill.model.config import ModelConfig


class LayerCache:
    """Keys and values of one layer, each (rows, kv_heads, room, head_width); grows by doubling, where the keys lie.

    `memory` holds the keys and values that cross-attention made of what the encoder read.
    """

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype) -> None:
        shape = (rows, config.kv_heads, 0, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)
        self.length = 0
        self.memory: tuple[Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (rows, kv_heads, new, head_width); returns all so far, as views."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            room = max(64, end, 2 * self.keys.shape[2])
            self.keys, self.values = (self._grown(old, room, keys.device) for old in (self.keys, self.values))
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grown(self, old: Tensor, room: int, device: torch.device) -> Tensor:
        rows, heads, _, width = old.shape
        new = torch.zeros((rows, heads, room, width), dtype=old.dtype, device=device)
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        if self.memory is not None:
            self.memory = self.memory[0][rows], self.memory[1][rows]


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
        layers = config.decoder_layers or config.layers
        self.layers = [LayerCache(config, rows, dtype) for _ in range(layers)]

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was: beams that go on from the same text."""
        for layer in self.layers:
            layer.reorder(rows)
        self.padding = None if self.padding is None else self.padding[rows]

    def positions(self, new: int, device: torch.device | None = None) -> Tensor:
        """Positions of the next `new` tokens: (rows or 1, new), on `device`. Padding counts as position 0.

        Raises:
            ModelError: they lie beyond the model's context.
        """
        if self.length + new > self.config.context:
            raise ModelError(
                f"The text would be {self.length + new:,} tokens long, but the model's context is {self.config.context:,}.",
                "Shorten the prompt or ask for fewer tokens.",
            )
        positions = torch.arange(self.length, self.length + new, device=device)[None]
        return positions if self.padding is None else (positions - self.padding[:, None]).clamp(min=0)

    def mask(self, new: int, device: torch.device | None = None) -> Tensor | None:
        """Who may look at whom: (rows or 1, 1, new, length + new), True where it may; None when all may."""
        if new == 1 and self.padding is None:
            return None
        total = self.length + new
        query = torch.arange(self.length, total, device=device)[:, None]
        key = torch.arange(total, device=device)[None, :]
        allowed = (key <= query)[None]
        if self.padding is not None:
            # a padding position may look at itself: a row without any key would be undefined
            allowed = allowed & ((key >= self.padding[:, None, None]) | (key == query))
        return allowed[:, None]
