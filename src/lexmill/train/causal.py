"""The causal objective: predict each next token (Bengio et al. 2003; Radford et al. 2018)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexmill.train.batches import Batch
from lexmill.train.cross_entropy import linear_cross_entropy
from lexmill.train.examples import IGNORED
from lexmill.train.objective import Losses


def causal_loss(model: Any, batch: Batch, *, smoothing: float = 0.0) -> Losses:
    """Cross-entropy of each target, by a decoder. Documents that share a row do not see each other."""
    hidden = model.hidden(batch.tensor("tokens"), batch.row_positions(), batch.mask(causal=True))
    return token_losses(hidden, model.head_weight, batch, smoothing)


def sequence_loss(model: Any, batch: Batch, *, smoothing: float = 0.0) -> Losses:
    """Cross-entropy of each target, by the decoder of an encoder–decoder that has read the tokens."""
    memory = model.encode(batch.tensor("tokens"), batch.mask(causal=False))
    hidden = model.decode(batch.tensor("decoder_tokens"), memory, batch.decoder_mask(), batch.memory_mask())
    return token_losses(hidden, model.head_weight, batch, smoothing)


def token_losses(hidden: Tensor, weight: Tensor, batch: Batch, smoothing: float = 0.0) -> Losses:
    """The losses of the "tokens" of a batch.

    Args:
        hidden: (rows, length, width).
        weight: (vocabulary, width) of the output projection.
        smoothing: the share of each target that is spread evenly over the vocabulary while learning
            (Szegedy et al. 2016, "Rethinking the Inception Architecture"); measuring goes without.
    """
    hidden, targets = counted(hidden, batch.tensor("targets"))
    total, right = linear_cross_entropy(hidden, targets, weight)
    if smoothing and torch.is_grad_enabled():
        total = total + smoothing * smoothed_away(hidden, targets, weight)
    losses = Losses()
    losses.add("tokens", (total, right))
    return losses


def smoothed_away(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """What cross-entropies rise by when the targets become the even distribution; the sum over all that count.

    -log p of a token is log Z less its logit, so that is the target's logit less the mean of all logits, and no
    logits need to exist but the targets' own. Arguments as of `linear_cross_entropy`.
    """
    learned = targets != IGNORED
    apart = F.embedding(targets.clamp(min=0), weight) - weight.mean(0)
    return (hidden.float() * apart).sum(-1)[learned].sum()


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
