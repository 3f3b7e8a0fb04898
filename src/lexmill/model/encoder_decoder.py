"""The encoder–decoder: one stack reads a text, another writes one and looks at what was read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lexmill.model.cache import Cache
from lexmill.model.config import ModelConfig
from lexmill.model.scope import Record
from lexmill.model.stack import Stack
from lexmill.model.transformer import Transformer


class EncoderDecoder(Transformer):
    """T5's shape (Raffel et al. 2020); version 1.1 with a gated MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.encoder = Stack(config, config.layers, causal=False)
        self.decoder = Stack(config, config.decoder_layers, causal=True, cross=True)
        self.add_head()

    def encode(self, tokens: Tensor, mask: Tensor | None = None, record: Record | None = None) -> Tensor:
        """Read a text: (batch, time) to its memory, (batch, time, width).

        Args:
            mask: as in `Scope`: packed or padded rows.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        return self.drop(self.encoder(self.drop(self.embed(tokens)), positions, mask, record=record))

    def decode(
        self,
        tokens: Tensor,  # (batch, time)
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """The decoder's last hidden states, ready for `head_weight`: (batch, time, width).

        Args:
            memory: what `encode` gave.
            mask: among the decoder's own tokens; None is plainly causal.
            memory_mask: (batch or 1, 1, time or 1, keys): which of the memory may be looked at.
            cache: is read and extended by these tokens.
        """
        time = tokens.shape[1]
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + time, device=tokens.device)[None]
        if cache is not None:
            mask = cache.mask(time, tokens.device)
        x = self.decoder(
            self.drop(self.embed(tokens)),
            positions,
            mask,
            cache=cache,
            memory=memory,
            memory_mask=memory_mask,
            record=record,
        )
        if cache is not None:
            cache.length += time
        return x * self.config.width**-0.5 if self.config.scale_output else x

    def forward(
        self,
        tokens: Tensor,
        decoder_tokens: Tensor,
        mask: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits at each decoder position: (batch, time, vocab_size)."""
        memory = self.encode(tokens, mask)
        return F.linear(self.decode(decoder_tokens, memory, decoder_mask, memory_mask), self.head_weight)
