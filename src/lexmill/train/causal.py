"""The causal objective: predict each next token (Bengio et al. 2003; Radford et al. 2018)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lexmill.train.batches import IGNORED, Batch


def causal_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """The sum of cross-entropies in nats over all targets, and how many there are.

    `model` is a decoder with `hidden` and `head_weight`. Documents that share a row do not see
    each other.
    """
    tokens, targets, positions, mask = batch.tensors()
    hidden = model.hidden(tokens, positions, mask)
    logits = F.linear(hidden, model.head_weight).flatten(0, 1)
    loss = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, batch.target_count
