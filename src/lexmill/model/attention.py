"""Attention: each position gathers from the positions that it may look at (Vaswani et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lexmill.model.adapted import adapted
from lexmill.model.attend import attend, attend_joined, attention_weights
from lexmill.model.cache import LayerCache
from lexmill.model.config import ModelConfig
from lexmill.model.linear import Linear, linear
from lexmill.model.norms import RMSNorm
from lexmill.model.positions import rotate
from lexmill.model.scope import Scope


class Attention(nn.Module):
    """Self-attention, or with `memory` cross-attention; grouped heads (Ainslie et al. 2023); a cache."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        query, key = config.heads * config.head_width, config.kv_heads * config.head_width
        self.q = Linear(config.width, query, bias=config.qkv_bias)
        self.k = Linear(config.width, key, bias=config.qkv_bias)
        self.v = Linear(config.width, key, bias=config.qkv_bias)
        self.out = Linear(query, config.width, bias=config.out_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_width, config.norm_eps)
            self.k_norm = RMSNorm(config.head_width, config.norm_eps)
        self.scale = config.head_width**-0.5 if config.scale_scores else 1.0

    def forward(
        self,
        x: Tensor,  # (batch, time, width)
        scope: Scope,
        cache: LayerCache | None = None,
        memory: Tensor | None = None,  # (batch, keys, width): what cross-attention looks at
        weights: list[Tensor] | None = None,  # receives the attention weights
    ) -> Tensor:
        config = self.config
        if memory is not None:
            q, k, v = self._look_at(memory, x, cache)
        else:
            joined = self._project(x)
            if cache is None and weights is None and not config.qk_norm:
                gathered = attend_joined(joined, (config.heads, config.kv_heads), scope, self.scale)
                if gathered is not None:
                    return self.out(gathered)
            q, k, v = self._split(joined, scope)
            if cache is not None:
                k, v = cache.append(k, v)
        if weights is not None:
            weights.append(attention_weights(q, k, scope, self.scale))
        gathered = attend(q, k, v, scope, self.scale)
        return self.out(gathered.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of the same text side by side: (batch, time, (heads + 2 kv_heads) * head_width).

        The three matrices are laid below each other for one product: it is faster than three.
        """
        parts = (self.q, self.k, self.v)
        if all(type(part) is Linear for part in parts):
            bias = torch.cat([part.bias for part in parts]) if self.config.qkv_bias else None
            return linear(x, bias, *(part.weight for part in parts))
        found = adapted(x, parts)
        # else layers that are quantised, say
        return torch.cat([part(x) for part in parts], -1) if found is None else found[0]

    def _split(self, joined: Tensor, scope: Scope) -> tuple[Tensor, Tensor, Tensor]:
        """Each of the three, normed and turned: (batch, heads or kv_heads, time, head_width)."""
        config = self.config
        qkv = joined.unflatten(-1, (-1, config.head_width))
        q, k, v = qkv.split([config.heads, config.kv_heads, config.kv_heads], dim=2)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if scope.rotary is not None:
            q, k = rotate(q, scope.rotary), rotate(k, scope.rotary)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _look_at(self, memory: Tensor, x: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of one text, keys and values of another; the latter are made once and kept in the cache."""

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)

        if cache is None:
            return heads(self.q(x)), heads(self.k(memory)), heads(self.v(memory))
        if cache.memory is None:
            cache.memory = heads(self.k(memory)), heads(self.v(memory))
        return heads(self.q(x)), *cache.memory
