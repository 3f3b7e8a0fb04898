"""Blocks one behind the other: what the three shapes of Transformer are put together from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lexmill.model.block import Block
from lexmill.model.cache import Cache
from lexmill.model.config import ModelConfig
from lexmill.model.norms import add_norm, make_norm
from lexmill.model.positions import RelativeBias, rotary_table
from lexmill.model.scope import Record, Scope, window_mask


class Stack(nn.Module):
    """`layers` blocks, the position biases that they share, and the final norm of pre-norm shapes.

    Attributes:
        recompute: in training keep only what goes into each block, and compute the rest again on the way
            back (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"); gradients are the same.
    """

    def __init__(self, config: ModelConfig, layers: int, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        self.config, self.causal, self.recompute = config, causal, False
        if config.positions == "relative":
            self.relative = RelativeBias(
                config.relative_buckets, config.heads, config.relative_distance, causal
            )
        self.blocks = nn.ModuleList(Block(config, layer, cross) for layer in range(layers))
        self.norm = nn.Identity() if config.post_norm else make_norm(config)

    def forward(
        self,
        x: Tensor,  # (batch, time, width): embeddings
        positions: Tensor,  # (batch or 1, time)
        mask: Tensor | None = None,
        *,
        cache: Cache | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,  # (batch or 1, 1, time or 1, keys)
        record: Record | None = None,
    ) -> Tensor:
        """The last hidden states, normed: (batch, time, width)."""
        wide, narrow = self._scopes(x, positions, mask, cache)
        memory_scope = Scope(memory_mask) if memory is not None else None
        if record:
            record.hidden.append(x)
        beside = None
        for index, block in enumerate(self.blocks):
            scope = narrow if self.config.is_local(index) else wide
            layer = cache.layers[index] if cache is not None else None
            inputs = x, beside, scope, layer, memory, memory_scope
            if self.recompute and self.training and torch.is_grad_enabled():
                x, beside = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, beside = block(*inputs, record)
            if record:
                record.hidden.append(x if self.config.post_norm else x + beside)
        if not self.config.post_norm:
            x = add_norm(self.norm, x, beside)[1]
        if record:
            record.hidden[-1] = x
        return x

    def _scopes(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> tuple[Scope, Scope]:
        """What layers that see all may look at, and what local ones may."""
        config, time = self.config, x.shape[1]
        rotary = bias = None
        if config.positions == "rotary":
            rotary = rotary_table(positions, config.head_width, config.rope_theta, config.rope_scaling)
        elif config.positions == "relative":
            bias = self.relative(time, time + (cache.length if cache is not None else 0))
        wide = Scope(mask, self.causal, rotary, bias)
        if not config.local_window:
            return wide, wide
        window = window_mask(time, config.local_window, x.device)
        table = rotary_table(positions, config.head_width, config.local_theta)
        return wide, Scope(window if mask is None else mask & window, self.causal, table)
