"""The decoder: a stack of causal blocks that gives, at each position, logits for the next token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.block import Block
from lexmill.model.cache import Cache
from lexmill.model.config import ModelConfig
from lexmill.model.names import weight_names
from lexmill.model.positions import rotary_table


class Decoder(nn.Module):
    """Llama's shape (Touvron et al. 2023); Qwen2's and Qwen3's by flags of `ModelConfig`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, width): the embedding itself when tied."""
        return self.embed.weight if self.config.tied else self.head.weight

    def hidden(
        self,
        tokens: Tensor,  # (batch, time)
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """The last hidden states, normed: (batch, time, width).

        Args:
            positions: (batch or 1, time); counted from 0, or on from the cache, when not given.
            mask: as in `Attention`; with a cache it is the cache that knows.
            cache: is read and extended by these tokens.
            weights: receives each layer's attention weights.
        """
        time = tokens.shape[1]
        if cache is not None:
            positions, mask = cache.positions(time), cache.mask(time)
        elif positions is None:
            positions = torch.arange(time, device=tokens.device)[None]
        rotary = rotary_table(positions, self.config.head_width, self.config.rope_theta)
        x = self.embed(tokens)
        cached = cache.length if cache is not None else 0
        for index, block in enumerate(self.blocks):
            x = block(x, rotary, mask, cache.layers[index] if cache is not None else None, cached, weights)
        if cache is not None:
            cache.length += time
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (batch, time, vocab_size)."""
        return F.linear(self.hidden(tokens, positions, mask, cache), self.head_weight)

    def initialise(self, seed: int) -> None:
        """Fresh weights, the same for the same seed on every machine.

        Normal with deviation 1/sqrt(inputs); what writes into the residual stream begins at zero
        (each block begins as the identity), and so trains faster from the first step.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith(("attention.out.weight", "mlp.down.weight")) or name.endswith(".bias"):
                    weight.zero_()
                elif weight.dim() == 1:
                    weight.fill_(1.0)
                else:
                    embedding = name in ("embed.weight", "head.weight")
                    deviation = 0.02 if embedding else weight.shape[1] ** -0.5
                    weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Copy in every weight by its own name; shapes must fit."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name in weight_names(self.config):
                parameters[name.own].copy_(torch.from_numpy(np.array(weights[name.own], dtype=np.float32)))

    def weights(self) -> dict[str, np.ndarray]:
        """Every weight by its own name, float32, as copies."""
        parameters = dict(self.named_parameters())
        return {
            name.own: parameters[name.own].detach().to("cpu", torch.float32).numpy().copy()
            for name in weight_names(self.config)
        }
