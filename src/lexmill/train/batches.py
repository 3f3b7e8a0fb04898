"""Examples to batches: documents packed side by side into rows, in an order that a checkpoint can name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lexmill.errors import TrainingError
from lexmill.train.examples import IGNORED, Example, Examples, places
from lexmill.train.packing import best_fit

_MAKE_AHEAD = 0.5  # of an epoch: then the next one is made, beside training
_INTEGER = np.int32  # of rows in memory; tensors are int64


@dataclass(frozen=True)
class Batch:
    """Rows of packed examples; all arrays have the shape (rows, length).

    `document` numbers the examples of a row from 0; what fills the end of a row has a number of
    its own. A position may only look at positions of its own number. `labels` stand at the first
    token of their example. With `decoder_tokens`, those, `decoder_document` and `targets` have
    the decoder's length. `origins`, (rows, most examples in a row), names the documents, -1 where
    there is none. Tensors are made on `device`.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    document: np.ndarray
    segments: np.ndarray | None = None
    labels: np.ndarray | None = None
    decoder_tokens: np.ndarray | None = None
    decoder_document: np.ndarray | None = None
    origins: np.ndarray | None = None
    device: torch.device | str = "cpu"

    @property
    def counts(self) -> dict[str, int]:
        """How many predictions of each kind count."""
        found = {"tokens": int((self.targets != IGNORED).sum())}
        if self.labels is not None:
            found["pairs"] = int((self.labels != IGNORED).sum())
        return found

    @property
    def size(self) -> int:
        """Tokens that a model computes on."""
        return self.tokens.size + (self.decoder_tokens.size if self.decoder_tokens is not None else 0)

    def select(self, rows: slice | np.ndarray) -> Batch:
        """Some of the rows."""
        arrays = {
            name: getattr(self, name)[rows]
            for name in self.__dataclass_fields__
            if isinstance(getattr(self, name), np.ndarray)
        }
        return Batch(**arrays, device=self.device)

    def to(self, device: torch.device | str) -> Batch:
        """The same rows, whose tensors are made on `device`."""
        return replace(self, device=device)

    def tensor(self, name: str) -> Tensor:
        """One of the arrays."""
        tensor = torch.from_numpy(np.ascontiguousarray(getattr(self, name), np.int64))
        return tensor.to(self.device, non_blocking=True)

    def row_positions(self) -> Tensor | None:
        """Positions where a row holds more than one example; None where they count from 0."""
        return self.tensor("positions") if self.document.any() else None

    def mask(self, *, causal: bool) -> Tensor | None:
        """Which tokens may look at which, (rows, 1, length, length); None where each row is one example."""
        return self._same("document", "document", causal) if self.document.any() else None

    def decoder_mask(self) -> Tensor | None:
        """The same among decoder tokens, which never look ahead."""
        document = self.decoder_document
        if document is None or not document.any():
            return None
        return self._same("decoder_document", "decoder_document", True)

    def memory_mask(self) -> Tensor | None:
        """Which decoder tokens may look at which tokens, (rows, 1, decoder length, length)."""
        if self.decoder_document is None or not (self.document.any() or self.decoder_document.any()):
            return None
        return self._same("decoder_document", "document", False)

    def _same(self, query: str, key: str, causal: bool) -> Tensor:
        mask = self.tensor(query)[:, :, None] == self.tensor(key)[:, None, :]
        if causal:
            mask &= torch.ones(mask.shape[1:], dtype=torch.bool, device=mask.device).tril()
        return mask[:, None]


def pack(examples: Sequence[Example], length: int, pad_id: int, decoder_length: int = 0) -> Batch:
    """Lay whole examples side by side into rows of `length` tokens.

    Best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"): the
    longest first, each into the fullest row that still holds it. For an encoder–decoder both
    sides of an example go into the same row.

    Raises:
        TrainingError: an example is empty or longer than a row; says which.
    """
    flat = Examples.of(examples)
    row, number, start, decoder_start = best_fit(flat.sizes, (length, decoder_length), flat.decoder_sizes)
    members = np.bincount(row)
    shape = (len(members), length)
    target_shape = (len(members), decoder_length) if decoder_length else shape
    at = places(row * length + start, flat.sizes)
    target_at = at
    decoder_tokens = decoder_document = None
    # what is left of a row gets a number that no example has, another one on each side
    document = _scattered(shape, members[:, None], at, np.repeat(number, flat.sizes))
    if decoder_length:
        assert flat.decoder_tokens is not None and flat.decoder_sizes is not None
        target_at = places(row * decoder_length + decoder_start, flat.decoder_sizes)
        decoder_tokens = _scattered(target_shape, pad_id, target_at, flat.decoder_tokens)
        # the decoder's filling looks at the encoder's, or where that has none, at an example's text:
        # a row of a softmax must not be empty, and nothing is learned from it either way
        filling = np.where(np.bincount(row, flat.sizes) < length, members, 0)[:, None]
        decoder_document = _scattered(target_shape, filling, target_at, np.repeat(number, flat.decoder_sizes))
    origins = np.full((len(members), members.max(initial=1)), -1, _INTEGER)
    origins[row, number] = flat.origins
    labels = None
    if (flat.labels != IGNORED).any():
        labels = _scattered(shape, IGNORED, row * length + start, flat.labels)
    return Batch(
        _scattered(shape, pad_id, at, flat.tokens),
        _scattered(target_shape, IGNORED, target_at, flat.targets),
        _scattered(shape, 0, at, places(np.zeros_like(flat.sizes), flat.sizes)),
        document,
        segments=None if flat.segments is None else _scattered(shape, 0, at, flat.segments),
        labels=labels,
        decoder_tokens=decoder_tokens,
        decoder_document=decoder_document,
        origins=origins,
    )


def _scattered(
    shape: tuple[int, int], filling: int | np.ndarray, at: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Rows of `filling` with `values` at the flat places `at`."""
    rows = np.empty(shape, _INTEGER)
    rows[:] = filling
    rows.reshape(-1)[at] = values
    return rows


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
        decoder_length: int = 0,
    ) -> None:
        self._examples, self._rows, self._length = examples, rows, length
        self._pad_id, self._seed, self._decoder_length = pad_id, seed, decoder_length
        self.epoch, self.position = 0, 0
        self._packed: tuple[Batch, np.ndarray] | None = None  # rows, and their order
        self._packed_epoch = -1
        self._worker = ThreadPoolExecutor(1, "loader")
        self._ahead: tuple[int, Future[tuple[Batch, np.ndarray]]] | None = None

    def state(self) -> dict[str, int]:
        """Where the loader stands, for a checkpoint."""
        return {"seed": self._seed, "epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def next(self, steps_left: int | None = None) -> Batch:
        """The next batch: `rows` rows, fewer at the end of an epoch.

        Args:
            steps_left: how many more will be asked for, if known; then no epoch is made in vain.

        Raises:
            TrainingError: there is nothing to learn from.
        """
        if self._packed is None or self._packed_epoch != self.epoch:
            self._packed, self._packed_epoch = self._take(self.epoch), self.epoch
        packed, order = self._packed
        batch = packed.select(order[self.position : self.position + self._rows])
        self.position += self._rows
        size = len(order)
        needed = steps_left is None or self.position + steps_left * self._rows > size
        if self._ahead is None and needed and self.position >= _MAKE_AHEAD * size:
            following = self.epoch + 1
            self._ahead = following, self._worker.submit(self._pack_epoch, following)
        if self.position >= size:
            self.epoch, self.position = self.epoch + 1, 0
        return batch

    def _take(self, epoch: int) -> tuple[Batch, np.ndarray]:
        """The rows of an epoch: made already, while the one before was still in use, or made now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == epoch:
            return ahead[1].result()
        return self._pack_epoch(epoch)

    def _pack_epoch(self, epoch: int) -> tuple[Batch, np.ndarray]:
        packed = pack(self._examples(epoch), self._length, self._pad_id, self._decoder_length)
        if packed.counts["tokens"] == 0:
            raise TrainingError(
                "There are no targets to learn from.", "Check the data: are the replies empty?"
            )
        return packed, np.random.default_rng([self._seed, epoch]).permutation(len(packed.tokens))


def fixed_batches(
    examples: Iterable[Example], *, rows: int, length: int, pad_id: int, decoder_length: int = 0
) -> list[Batch]:
    """The same examples once, in packed order, for validation."""
    packed = pack(list(examples), length, pad_id, decoder_length)
    return [packed.select(slice(start, start + rows)) for start in range(0, len(packed.tokens), rows)]
