"""One layer of a Transformer: attention, in some decoders cross-attention, an MLP; each added to the stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.attention import Attention
from lexmill.model.cache import LayerCache
from lexmill.model.config import ModelConfig
from lexmill.model.mlp import MLP
from lexmill.model.norms import add_norm, make_norm
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
        x: Tensor,  # (batch, time, width): the stream
        beside: Tensor | None,  # the same shape
        scope: Scope,
        cache: LayerCache | None = None,
        memory: Tensor | None = None,
        memory_scope: Scope | None = None,
        record: Record | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream behind this block, and what goes beside it.

        That is, with norms before each part, the last branch: the next norm adds it, in the same pass.
        With norms behind, it is the stream again as products read it. None at the first block.
        """
        seen = record.attention if record else None
        if self.post_norm:
            branch = self.attention(x if beside is None else beside, scope, cache, weights=seen)
            x, normed = add_norm(self.attention_norm, x, self._drop(branch), post=True)
            return add_norm(self.mlp_norm, x, self._drop(self.mlp(normed)), post=True)
        x, normed = add_norm(self.attention_norm, x, beside)
        branch = self.attention(normed, scope, cache, weights=seen)
        if memory is not None:
            assert memory_scope is not None
            x, normed = add_norm(self.cross_norm, x, self._drop(branch))
            branch = self.cross(normed, memory_scope, cache, memory, record.cross if record else None)
        x, normed = add_norm(self.mlp_norm, x, self._drop(branch))
        return x, self._drop(self.mlp(normed))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x
