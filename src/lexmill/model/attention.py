"""Attention: each position gathers from the positions that it may look at (Vaswani et al. 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.cache import LayerCache
from lexmill.model.config import ModelConfig
from lexmill.model.positions import rotate


class Attention(nn.Module):
    """Self-attention with grouped heads (Ainslie et al. 2023), rotary positions and a cache.

    `mask` is None for plainly causal rows, or booleans (batch or 1, 1, queries, keys) that are
    True where a query may look: packed documents, or rows padded on the left.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        query, key = config.heads * config.head_width, config.kv_heads * config.head_width
        self.q = nn.Linear(config.width, query, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, key, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, key, bias=config.qkv_bias)
        self.out = nn.Linear(query, config.width, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,  # (batch, time, width)
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        cached: int = 0,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        batch, time, _ = x.shape
        config = self.config
        qk, v = self._project(x)
        if config.qk_norm:
            q, k = qk[:, :, : config.heads], qk[:, :, config.heads :]
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        qk = rotate(qk, rotary).transpose(1, 2)  # (batch, heads + kv_heads, time, head_width)
        q, k = qk[:, : config.heads], qk[:, config.heads :]
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v, cached)
        causal = mask is None and time > 1
        if weights is not None:
            weights.append(attention_weights(q, k, mask, causal))
        gathered = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=config.kv_heads != config.heads
        )
        return self.out(gathered.transpose(1, 2).reshape(batch, time, -1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys together, (batch, time, heads + kv_heads, D), and values (batch, time, kv_heads, D).

        The three matrices are laid side by side for one product: it is faster than three.
        """
        config = self.config
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias]) if config.qkv_bias else None
        qkv = F.linear(x, weight, bias).unflatten(-1, (-1, config.head_width))
        return qkv.split([config.heads + config.kv_heads, config.kv_heads], dim=2)  # type: ignore[return-value]


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """How much each query looks at each key: (batch, heads, queries, keys), rows sum to 1."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)
