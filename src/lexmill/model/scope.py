"""What the positions of a layer may look at, and what a caller may ask to see of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scope:
    """What the queries of a layer may look at, and how positions come in.

    Attributes:
        mask: (batch or 1, 1, queries, keys) booleans, True where a query may look; None: everywhere.
        causal: nothing behind a query's own place is seen. A mask says so too where there is one;
            with neither, this alone does.
        rotary: cosines and sines from `rotary_table`.
        bias: (1, heads, queries, keys), added to the scores.
    """

    mask: Tensor | None = None
    causal: bool = False
    rotary: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None

    @cached_property
    def mask_by_key(self) -> Tensor | None:
        """The mask as compiled attention reads it, (batch or 1, keys, queries); made once for all layers."""
        return None if self.mask is None else self.mask[:, 0].mT.contiguous()


@dataclass
class Record:
    """What a forward pass leaves for those who want to see it, in the order of the layers.

    Attributes:
        hidden: the residual stream before the first layer and behind each, (batch, time, width);
            the last one is normed, as Hugging Face gives it.
        attention: weights of self-attention, (batch, heads, queries, keys); rows sum to 1.
        cross: the same for cross-attention.
    """

    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)


def window_mask(time: int, window: int, device: torch.device | None = None) -> Tensor:
    """True within `window` // 2 places to each side: (1, 1, time, time)."""
    place = torch.arange(time, device=device)
    return ((place[:, None] - place[None, :]).abs() <= window // 2)[None, None]
