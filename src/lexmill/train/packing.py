"""Which examples share a row: best fit, on counts alone."""

from __future__ import annotations

import itertools

import numpy as np

from lexmill.errors import TrainingError


def best_fit(
    sizes: np.ndarray, rooms: tuple[int, int], decoder_sizes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Put each example into the fullest row that still holds it, the longest first.

    Examples of equal size are placed together: rows with equal room are as good as each other, so
    that the work grows with the number of different sizes and not with the number of rows.

    Args:
        sizes: (n,) tokens of each example.
        rooms: tokens that a row holds, and those of its decoder's side (0 where there is none).
        decoder_sizes: (n,) tokens of each on the decoder's side.

    Returns:
        Of each example: its row, its number in that row, and where it begins on both sides; all (n,).

    Raises:
        TrainingError: an example is empty or longer than a row; says which.

    Best-fit decreasing, after Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
    """
    others = np.zeros_like(sizes) if decoder_sizes is None else decoder_sizes
    _check(sizes, others, rooms)
    order = np.lexsort((-others, -sizes))  # stable: equal ones stay in their order
    sorted_sizes, sorted_others = sizes[order], others[order]
    changes = (np.diff(sorted_sizes) != 0) | (np.diff(sorted_others) != 0)
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(order)]
    placed = _Rows(rooms, len(sizes))
    for first, end in itertools.pairwise(bounds):
        if end > first:
            placed.add(first, end, int(sorted_sizes[first]), int(sorted_others[first]))
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return placed.row[back], placed.number[back], placed.start[back], placed.decoder_start[back]


def _check(sizes: np.ndarray, others: np.ndarray, rooms: tuple[int, int]) -> None:
    for bad in np.flatnonzero((sizes < 1) | (sizes > rooms[0]))[:1]:
        raise TrainingError(
            f"Example {bad} has {sizes[bad]:,} tokens, which do not fit a row of {rooms[0]:,}."
        )
    for bad in np.flatnonzero(others > rooms[1])[:1]:
        raise TrainingError(
            f"Example {bad} has {others[bad]:,} tokens to write, which do not fit a row of {rooms[1]:,}."
        )


class _Rows:
    """Rows by the room that they have left, and where each example has been put (in order of placing)."""

    def __init__(self, rooms: tuple[int, int], examples: int) -> None:
        self._rooms = rooms
        # tokens left -> decoder tokens left -> rows, and what those rows hold already
        self._left: dict[int, dict[int, list[int]]] = {}
        self._filled = 0  # bit n is set where there is a row with n tokens left
        self._members = np.zeros(examples, np.int64)  # of each row
        self._rows = 0
        self.row, self.number, self.start, self.decoder_start = np.zeros((4, examples), np.int64)

    def add(self, first: int, end: int, size: int, other: int) -> None:
        """Place the examples `first` to `end`, all of the same size."""
        while first < end:
            left, decoder_left = self._fullest(size, other)
            each = left // size if not other else min(left // size, decoder_left // other)
            rows = self._take(left, decoder_left, -(-(end - first) // each))
            count = min(end - first, each * len(rows))
            self._put(slice(first, first + count), rows, each, (left, decoder_left), (size, other))
            first += count
            full, rest = divmod(count, each)
            self._give_back(rows[:full], left - each * size, decoder_left - each * other)
            self._give_back(rows[full:], left - rest * size, decoder_left - rest * other)

    def _fullest(self, size: int, other: int) -> tuple[int, int]:
        """The least room that is enough; that of a new row where no begun one has enough."""
        some = self._filled >> size
        left = size
        while some:
            left += (some & -some).bit_length() - 1
            enough = [room for room in self._left[left] if room >= other]
            if enough:
                return left, min(enough)
            left += 1
            some = self._filled >> left
        return self._rooms

    def _take(self, left: int, decoder_left: int, most: int) -> np.ndarray:
        """Up to `most` rows with that room; new ones where there are none."""
        bucket = self._left.get(left, {}).get(decoder_left, [])
        if not bucket:
            self._rows += most
            return np.arange(self._rows - most, self._rows)
        bucket.sort()  # among rows with equal room the first one, as plain best fit does it
        taken, kept = bucket[:most], bucket[most:]
        if kept:
            self._left[left][decoder_left] = kept
        else:
            del self._left[left][decoder_left]
            if not self._left[left]:
                del self._left[left]
                self._filled &= ~(1 << left)
        return np.array(taken, np.int64)

    def _put(
        self, those: slice, rows: np.ndarray, each: int, left: tuple[int, int], size: tuple[int, int]
    ) -> None:
        """Up to `each` examples into each of the rows, one behind the other."""
        count = those.stop - those.start
        turn = np.tile(np.arange(each), len(rows))[:count]
        row = np.repeat(rows, each)[:count]
        self.row[those], self.number[those] = row, self._members[row] + turn
        self.start[those] = self._rooms[0] - left[0] + turn * size[0]
        self.decoder_start[those] = self._rooms[1] - left[1] + turn * size[1]
        self._members[rows] += np.bincount(np.arange(count) // each, minlength=len(rows))

    def _give_back(self, rows: np.ndarray, left: int, decoder_left: int) -> None:
        """Rows that have so much room now; full ones are done."""
        if len(rows) and left and (decoder_left or not self._rooms[1]):
            self._left.setdefault(left, {}).setdefault(decoder_left, []).extend(rows.tolist())
            self._filled |= 1 << left
