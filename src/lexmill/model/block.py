"""One layer of a Transformer: attention, in some decoders cross-attention, an MLP; each added to the stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.attention import Attention
from lexmill.model.cache import LayerCache
from lexmill.model.config import ModelConfig
from lexmill.model.mlp import MLP
from lexmill.model.norms import make_norm
from lexmill.model.scope import Record, Scope


class Block(nn.Module):
    """Norms before each part (Llama, T5, ModernBERT), or behind each sum (BERT)."""

    def __init__(self, config: ModelConfig, layer: int, cross: bool = False) -> None:
        super().__init__()
        self.post_norm, self.dropout = config.post_norm, config.dropout
        normed_before = config.embed_norm and not config.post_norm and layer == 0
        self.attention_norm = nn.Identity() if normed_before else make_norm(config)
        self.attention = Attention(config)
        if cross:
            self.cross_norm = make_norm(config)
            self.cross = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,  # (batch, time, width)
        scope: Scope,
        cache: LayerCache | None = None,
        memory: Tensor | None = None,
        memory_scope: Scope | None = None,
        record: Record | None = None,
    ) -> Tensor:
        seen = record.attention if record else None
        if self.post_norm:
            x = self.attention_norm(x + self._drop(self.attention(x, scope, cache, weights=seen)))
            return self.mlp_norm(x + self._drop(self.mlp(x)))
        x = x + self._drop(self.attention(self.attention_norm(x), scope, cache, weights=seen))
        if memory is not None:
            assert memory_scope is not None
            seen = record.cross if record else None
            x = x + self._drop(self.cross(self.cross_norm(x), memory_scope, cache, memory, seen))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x
