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
    """Hidden states and targets of the places that count, (n, width) and (n,).

    Unless all places count, some that do not are added behind, so that only a few different n occur: each
    new shape of a matrix product is compiled anew on a CPU, and what that keeps lies scattered among the
    freed memory (measured: 60 MB more a step).
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    places = targets != IGNORED
    if bool(places.all()):
        return hidden, targets
    size = _few_sizes(int(places.sum()), len(targets))
    index = places.logical_not().argsort(stable=True)[:size]
    return hidden.index_select(0, index), targets[index]


def _few_sizes(count: int, most: int) -> int:
    """`count` or somewhat more, by an eighth at most and never above `most`: eight sizes an octave."""
    step = max(1, 1 << (count.bit_length() - 4)) if count > 8 else 1
    return min(most, -(-count // step) * step)
