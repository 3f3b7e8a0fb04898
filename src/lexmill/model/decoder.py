"""The decoder: a stack of causal blocks that gives, at each position, logits for the next token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lexmill.model.cache import Cache
from lexmill.model.config import ModelConfig
from lexmill.model.scope import Record
from lexmill.model.stack import Stack
from lexmill.model.transformer import Transformer


class Decoder(Transformer):
    """Llama's shape (Touvron et al. 2023); Qwen2's and Qwen3's by flags of `ModelConfig`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.decoder = Stack(config, config.layers, causal=True)
        self.add_head()

    def hidden(
        self,
        tokens: Tensor,  # (batch, time)
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """The last hidden states, normed: (batch, time, width).

        Args:
            positions: (batch or 1, time); counted from 0, or on from the cache, when not given.
            mask: as in `Scope`; with a cache it is the cache that knows.
            cache: is read and extended by these tokens.
            record: receives each layer's hidden states and attention weights.
        """
        time = tokens.shape[1]
        if cache is not None:
            positions, mask = cache.positions(time, tokens.device), cache.mask(time, tokens.device)
        elif positions is None:
            positions = torch.arange(time, device=tokens.device)[None]
        x = self.decoder(self.drop(self.embed(tokens)), positions, mask, cache=cache, record=record)
        if cache is not None:
            cache.length += time
        return x

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Logits (batch, time, vocab_size)."""
        return F.linear(self.hidden(tokens, positions, mask, cache, record), self.head_weight)
