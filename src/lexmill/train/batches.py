"""Examples to batches: documents packed side by side into rows, in an order that a checkpoint can name."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lexmill.errors import TrainingError

IGNORED = -100  # a target that does not count


@dataclass(frozen=True)
class Example:
    """One piece of a document. `targets[i]` is what should follow `tokens[i]`, or `IGNORED`. Shapes (n,)."""

    tokens: np.ndarray
    targets: np.ndarray


def next_token_example(ids: np.ndarray, counts: np.ndarray | None = None) -> Example:
    """Predict each token of `ids` from those before it.

    Args:
        ids: (n + 1,) token ids.
        counts: (n + 1,) booleans: which of them are targets. All when not given.
    """
    targets = ids[1:].astype(np.int64)
    if counts is not None:
        targets[~counts[1:]] = IGNORED
    return Example(ids[:-1].astype(np.int64), targets)


@dataclass(frozen=True)
class Batch:
    """Rows of packed examples; all arrays have the shape (rows, length).

    `document` numbers the examples of a row from 0; what fills the end of a row has a number of
    its own. A position may only look at positions of its own number.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    document: np.ndarray

    @property
    def target_count(self) -> int:
        """How many predictions count."""
        return int((self.targets != IGNORED).sum())

    def rows(self, start: int, end: int) -> Batch:
        """A part of the batch, as views."""
        return Batch(
            *(getattr(self, name)[start:end] for name in ("tokens", "targets", "positions", "document"))
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Tokens, targets, and where a row holds more than one example: positions and attention mask."""
        tokens, targets = torch.from_numpy(self.tokens), torch.from_numpy(self.targets)
        if not self.document.any():
            return tokens, targets, None, None
        document = torch.from_numpy(self.document)
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = (document[:, :, None] == document[:, None, :]) & causal
        return tokens, targets, torch.from_numpy(self.positions), mask[:, None]


def pack(examples: Sequence[Example], length: int, pad_id: int) -> Batch:
    """Lay whole examples side by side into rows of `length` tokens.

    Best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"): the
    longest first, each into the fullest row that still holds it.

    Raises:
        TrainingError: an example is empty or longer than a row; says which.
    """
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].tokens), index))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in order:
        size = len(examples[index].tokens)
        if not 0 < size <= length:
            raise TrainingError(f"Example {index} has {size:,} tokens, which do not fit a row of {length:,}.")
        place = bisect.bisect_left(room, (size, -1))
        if place == len(room):
            rows.append([index])
            left, row = length - size, len(rows) - 1
        else:
            left, row = room.pop(place)
            rows[row].append(index)
            left -= size
        if left:
            bisect.insort(room, (left, row))
    shape = (len(rows), length)
    batch = Batch(
        np.full(shape, pad_id, np.int64),
        np.full(shape, IGNORED, np.int64),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
    )
    for row, members in enumerate(rows):
        start = 0
        for number, index in enumerate(members):
            end = start + len(examples[index].tokens)
            batch.tokens[row, start:end] = examples[index].tokens
            batch.targets[row, start:end] = examples[index].targets
            batch.positions[row, start:end] = np.arange(end - start)
            batch.document[row, start:end] = number
            start = end
        batch.document[row, start:] = len(members)
    return batch


class Loader:
    """Endless batches, epoch after epoch, each epoch in an order of its own.

    Everything follows from (seed, epoch, position), which `state` gives and `restore` takes: a
    run that was killed goes on with the very batch that would have come.
    """

    def __init__(
        self,
        examples: Callable[[int], Sequence[Example]],
        *,
        rows: int,
        length: int,
        pad_id: int,
        seed: int,
    ) -> None:
        self._examples, self._rows, self._length = examples, rows, length
        self._pad_id, self._seed = pad_id, seed
        self.epoch, self.position = 0, 0
        self._packed: Batch | None = None
        self._packed_epoch = -1

    def state(self) -> dict[str, int]:
        """Where the loader stands, for a checkpoint."""
        return {"seed": self._seed, "epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def next(self) -> Batch:
        """The next batch: `rows` rows, fewer at the end of an epoch.

        Raises:
            TrainingError: there is nothing to learn from.
        """
        if self._packed is None or self._packed_epoch != self.epoch:
            self._packed = self._pack_epoch()
            self._packed_epoch = self.epoch
        batch = self._packed.rows(self.position, self.position + self._rows)
        self.position += self._rows
        if self.position >= len(self._packed.tokens):
            self.epoch, self.position = self.epoch + 1, 0
        return batch

    def _pack_epoch(self) -> Batch:
        packed = pack(self._examples(self.epoch), self._length, self._pad_id)
        if packed.target_count == 0:
            raise TrainingError(
                "There are no targets to learn from.", "Check the data: are the replies empty?"
            )
        order = np.random.default_rng([self._seed, self.epoch]).permutation(len(packed.tokens))
        return Batch(
            packed.tokens[order], packed.targets[order], packed.positions[order], packed.document[order]
        )


def fixed_batches(examples: Iterable[Example], *, rows: int, length: int, pad_id: int) -> list[Batch]:
    """The same examples once, in packed order, for validation."""
    packed = pack(list(examples), length, pad_id)
    return [packed.rows(start, start + rows) for start in range(0, len(packed.tokens), rows)]
