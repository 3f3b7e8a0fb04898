"""The causal objective: predict each next token (Bengio et al. 2003; Radford et al. 2018)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lexmill.train.batches import Batch
from lexmill.train.cross_entropy import linear_cross_entropy
from lexmill.train.examples import IGNORED
from lexmill.train.objective import Losses


def causal_loss(model: Any, batch: Batch) -> Losses:
    """Cross-entropy of each target, by a decoder. Documents that share a row do not see each other."""
    hidden = model.hidden(batch.tensor("tokens"), batch.row_positions(), batch.mask(causal=True))
    return token_losses(hidden, model.head_weight, batch)


def sequence_loss(model: Any, batch: Batch) -> Losses:
    """Cross-entropy of each target, by the decoder of an encoder–decoder that has read the tokens."""
    memory = model.encode(batch.tensor("tokens"), batch.mask(causal=False))
    hidden = model.decode(batch.tensor("decoder_tokens"), memory, batch.decoder_mask(), batch.memory_mask())
    return token_losses(hidden, model.head_weight, batch)


def token_losses(hidden: Tensor, weight: Tensor, batch: Batch) -> Losses:
    """The losses of the "tokens" of a batch.

    Args:
        hidden: (rows, length, width).
        weight: (vocabulary, width) of the output projection.
    """
    losses = Losses()
    losses.add("tokens", linear_cross_entropy(*counted(hidden, batch.tensor("targets")), weight))
    return losses


def counted(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and targets of the places that count, (n, width) and (n,)."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    places = targets != IGNORED
    if bool(places.all()):
        return hidden, targets
    index = places.nonzero()[:, 0]
    return hidden.index_select(0, index), targets[index]
