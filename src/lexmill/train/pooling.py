"""One vector for each text of packed rows, and softmax among a text's own places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lexmill.errors import ConfigError
from lexmill.train.batches import Batch


def read_rows(model: Any, batch: Batch, *, segments: bool = True) -> Tensor:
    """An encoder's last hidden states of packed rows, (rows, length, width)."""
    return model.hidden(
        batch.tensor("tokens"),
        batch.row_positions(),
        batch.mask(causal=False),
        segments=batch.tensor("segments") if segments and batch.segments is not None else None,
    )


def groups(document: Tensor) -> tuple[Tensor, int]:
    """A number for each document of a batch, the same at all of its places.

    Args:
        document: (rows, length), numbered from 0 in each row.

    Returns:
        (rows · length,) numbers, and how many there can be.
    """
    most = int(document.max()) + 1
    rows = torch.arange(len(document), device=document.device)[:, None]
    return (rows * most + document).flatten(), len(document) * most


def pool(hidden: Tensor, group: Tensor, count: int, pooling: str) -> Tensor:
    """The vector of each group: (count, width), float32; of a number without places, zeros.

    Args:
        hidden: (rows, length, width).
        group, count: from `groups`.
        pooling: "mean", "cls" (the first place), "last" or "max".
    """
    states = hidden.flatten(0, 1).float()
    if pooling == "mean":
        sums = states.new_zeros(count, states.shape[1]).index_add(0, group, states)
        sizes = states.new_zeros(count).index_add(0, group, torch.ones_like(group, dtype=states.dtype))
        return sums / sizes.clamp(min=1)[:, None]
    if pooling == "max":
        lowest = states.new_full((count, states.shape[1]), float("-inf"))
        index = group[:, None].expand_as(states)
        highest = lowest.scatter_reduce(0, index, states, "amax")
        return highest.masked_fill(highest == float("-inf"), 0.0)
    if pooling not in ("cls", "last"):
        raise ConfigError(f"There is no pooling '{pooling}' in training.", "Take mean, cls, last or max.")
    places = torch.arange(len(group), device=group.device)
    kind, begin = ("amin", len(group)) if pooling == "cls" else ("amax", -1)
    at = places.new_full((count,), begin).scatter_reduce(0, group, places, kind)
    there = (at >= 0) & (at < len(group))
    return states[at.clamp(0, len(group) - 1)] * there[:, None]


def group_log_softmax(scores: Tensor, group: Tensor, count: int) -> Tensor:
    """log softmax(scores) among the places of each group: (places, kinds), float32.

    Args:
        scores: (places, kinds): each kind is normed by itself.
    """
    scores = scores.float()
    index = group[:, None].expand_as(scores)
    lowest = scores.new_full((count, scores.shape[1]), float("-inf"))
    highest = lowest.scatter_reduce(0, index, scores.detach(), "amax")
    shifted = scores - highest[group]
    sums = scores.new_zeros(count, scores.shape[1]).index_add(0, group, shifted.exp())
    return shifted - sums.log()[group]
