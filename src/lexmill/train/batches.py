"""Examples to batches: documents packed side by side into rows, in an order that a checkpoint can name."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lexmill.errors import TrainingError

IGNORED = -100  # a target that does not count
_MAKE_AHEAD = 0.5  # of an epoch: then the next one is made, beside training


@dataclass(frozen=True)
class Example:
    """One piece of a document; every array has the shape (n,).

    `targets[i]` is what should be predicted at `tokens[i]`, or `IGNORED`; where there are
    `decoder_tokens` it belongs to those, and `tokens` are what the encoder reads.
    `segments` tells the two texts of a pair apart, `label` says whether the second does not
    follow the first (0 follows, 1 does not, `IGNORED` is not asked). `origin` is the number of the
    document in its split, -1 where there is no single one.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray | None = None
    decoder_tokens: np.ndarray | None = None
    label: int = IGNORED
    origin: int = -1


def next_token_example(ids: np.ndarray, counts: np.ndarray | None = None, origin: int = -1) -> Example:
    """Predict each token of `ids` from those before it.

    Args:
        ids: (n + 1,) token ids.
        counts: (n + 1,) booleans: which of them are targets. All when not given.
        origin: of which document.
    """
    targets = ids[1:].astype(np.int64)
    if counts is not None:
        targets[~counts[1:]] = IGNORED
    return Example(ids[:-1].astype(np.int64), targets, origin=origin)


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
        tensor = torch.from_numpy(np.ascontiguousarray(getattr(self, name)))
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
    rows = _best_fit([_sizes(example) for example in examples], (length, decoder_length))
    shape = (len(rows), length)
    target_shape = (len(rows), decoder_length) if decoder_length else shape
    has_segments = any(example.segments is not None for example in examples)
    has_labels = any(example.label != IGNORED for example in examples)
    # what is left of a row gets a number that no example has, another one on each side
    batch = Batch(
        np.full(shape, pad_id, np.int64),
        np.full(target_shape, IGNORED, np.int64),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
        segments=np.zeros(shape, np.int64) if has_segments else None,
        labels=np.full(shape, IGNORED, np.int64) if has_labels else None,
        decoder_tokens=np.full(target_shape, pad_id, np.int64) if decoder_length else None,
        decoder_document=np.zeros(target_shape, np.int64) if decoder_length else None,
        origins=_origins(rows, examples),
    )
    for row, members in enumerate(rows):
        start = decoder_start = 0
        for number, index in enumerate(members):
            example = examples[index]
            end = start + len(example.tokens)
            batch.tokens[row, start:end] = example.tokens
            batch.positions[row, start:end] = np.arange(end - start)
            batch.document[row, start:end] = number
            if batch.segments is not None and example.segments is not None:
                batch.segments[row, start:end] = example.segments
            if batch.labels is not None:
                batch.labels[row, start] = example.label
            if batch.decoder_tokens is None or batch.decoder_document is None:
                batch.targets[row, start:end] = example.targets
            else:
                decoder_end = decoder_start + len(example.targets)
                batch.targets[row, decoder_start:decoder_end] = example.targets
                batch.decoder_tokens[row, decoder_start:decoder_end] = example.decoder_tokens
                batch.decoder_document[row, decoder_start:decoder_end] = number
                decoder_start = decoder_end
            start = end
        batch.document[row, start:] = len(members)
        if batch.decoder_document is not None:
            # the decoder's filling looks at the encoder's, or where that has none, at an example's text:
            # a row of a softmax must not be empty, and nothing is learned from it either way
            batch.decoder_document[row, decoder_start:] = len(members) if start < length else 0
    return batch


def _origins(rows: list[list[int]], examples: Sequence[Example]) -> np.ndarray:
    """(rows, most examples in a row): which documents a row holds, -1 behind the last."""
    origins = np.full((len(rows), max(map(len, rows), default=1)), -1, np.int64)
    for row, members in enumerate(rows):
        origins[row, : len(members)] = [examples[index].origin for index in members]
    return origins


def _sizes(example: Example) -> tuple[int, int]:
    return len(example.tokens), 0 if example.decoder_tokens is None else len(example.decoder_tokens)


def _best_fit(sizes: Sequence[tuple[int, int]], rooms: tuple[int, int]) -> list[list[int]]:
    """Which examples share a row. `sizes` and `rooms` count the tokens of both sides."""
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index][0], -sizes[index][1], index))
    rows: list[list[int]] = []
    room: list[tuple[int, int, int]] = []  # (tokens left, row, decoder tokens left), sorted
    for index in order:
        size, decoder_size = sizes[index]
        if not 0 < size <= rooms[0]:
            raise TrainingError(
                f"Example {index} has {size:,} tokens, which do not fit a row of {rooms[0]:,}."
            )
        if decoder_size > rooms[1]:
            raise TrainingError(
                f"Example {index} has {decoder_size:,} tokens to write, which do not fit a row of {rooms[1]:,}."
            )
        place = bisect.bisect_left(room, (size, -1, -1))
        while place < len(room) and room[place][2] < decoder_size:
            place += 1
        if place == len(room):
            rows.append([index])
            left, row, decoder_left = rooms[0] - size, len(rows) - 1, rooms[1] - decoder_size
        else:
            left, row, decoder_left = room.pop(place)
            rows[row].append(index)
            left, decoder_left = left - size, decoder_left - decoder_size
        if left and (decoder_left or not rooms[1]):
            bisect.insort(room, (left, row, decoder_left))
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
        self._packed: Batch | None = None
        self._packed_epoch = -1
        self._worker = ThreadPoolExecutor(1, "loader")
        self._ahead: tuple[int, Future[Batch]] | None = None

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
        batch = self._packed.select(slice(self.position, self.position + self._rows))
        self.position += self._rows
        size = len(self._packed.tokens)
        needed = steps_left is None or self.position + steps_left * self._rows > size
        if self._ahead is None and needed and self.position >= _MAKE_AHEAD * size:
            following = self.epoch + 1
            self._ahead = following, self._worker.submit(self._pack_epoch, following)
        if self.position >= size:
            self.epoch, self.position = self.epoch + 1, 0
        return batch

    def _take(self, epoch: int) -> Batch:
        """The rows of an epoch: made already, while the one before was still in use, or made now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == epoch:
            return ahead[1].result()
        return self._pack_epoch(epoch)

    def _pack_epoch(self, epoch: int) -> Batch:
        packed = pack(self._examples(epoch), self._length, self._pad_id, self._decoder_length)
        if packed.counts["tokens"] == 0:
            raise TrainingError(
                "There are no targets to learn from.", "Check the data: are the replies empty?"
            )
        order = np.random.default_rng([self._seed, epoch]).permutation(len(packed.tokens))
        return packed.select(order)


def fixed_batches(
    examples: Iterable[Example], *, rows: int, length: int, pad_id: int, decoder_length: int = 0
) -> list[Batch]:
    """The same examples once, in packed order, for validation."""
    packed = pack(list(examples), length, pad_id, decoder_length)
    return [packed.select(slice(start, start + rows)) for start in range(0, len(packed.tokens), rows)]
