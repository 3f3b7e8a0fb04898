"""What is learned from, before it is laid into rows: examples, and many of them as flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

IGNORED = -100  # a target that does not count


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


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Many examples, one behind the other in flat arrays: a pass over a corpus has too many for objects.

    `examples[i]` is a view of one as an `Example`.

    Attributes:
        tokens: (sum of sizes,).
        sizes: (examples,) tokens of each.
        targets: of all, as long as `tokens`, or as `decoder_tokens` where there are those.
        labels, origins: (examples,).
        segments: as long as `tokens`.
        decoder_tokens: (sum of decoder_sizes,).
        decoder_sizes: (examples,), 0 where there are no decoder tokens.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    targets: np.ndarray
    labels: np.ndarray
    origins: np.ndarray
    segments: np.ndarray | None = None
    decoder_tokens: np.ndarray | None = None
    decoder_sizes: np.ndarray | None = None

    def __post_init__(self) -> None:
        # where each begins; found once, because `examples[i]` asks for it
        object.__setattr__(self, "_starts", begins(self.sizes))
        if self.decoder_sizes is not None:
            object.__setattr__(self, "_decoder_starts", begins(self.decoder_sizes))

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """The same examples, flat; the arrays of a list are copied."""
        if isinstance(examples, Examples):
            return examples
        with_segments = any(example.segments is not None for example in examples)
        decoded = any(example.decoder_tokens is not None for example in examples)
        sizes = np.array([len(example.tokens) for example in examples], np.int64)
        return cls(
            _joined([example.tokens for example in examples]),
            sizes,
            _joined([example.targets for example in examples]),
            np.array([example.label for example in examples], np.int64),
            np.array([example.origin for example in examples], np.int64),
            _joined([_or_zeros(example.segments, len(example.tokens)) for example in examples])
            if with_segments
            else None,
            _joined([_or_zeros(example.decoder_tokens, 0) for example in examples]) if decoded else None,
            np.array([len(_or_zeros(example.decoder_tokens, 0)) for example in examples], np.int64)
            if decoded
            else None,
        )

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        start = self._starts[index]  # type: ignore[attr-defined]
        own = target = slice(start, start + self.sizes[index])
        decoder = None
        if self.decoder_tokens is not None and self.decoder_sizes is not None:
            start = self._decoder_starts[index]  # type: ignore[attr-defined]
            target = slice(start, start + self.decoder_sizes[index])
            decoder = self.decoder_tokens[target]
        return Example(
            self.tokens[own],
            self.targets[target],
            None if self.segments is None else self.segments[own],
            decoder,
            int(self.labels[index]),
            int(self.origins[index]),
        )


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _or_zeros(array: np.ndarray | None, size: int) -> np.ndarray:
    return np.zeros(size, np.int64) if array is None else array


def begins(sizes: np.ndarray) -> np.ndarray:
    """Where each of several stretches begins that lie one behind the other: (n,) from sizes (n,)."""
    return np.cumsum(sizes) - sizes


def places(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """All places of stretches: starts[0], starts[0] + 1, …, then those of the next. (sum of sizes,)"""
    return np.arange(int(sizes.sum())) + np.repeat(starts - begins(sizes), sizes)


def windows(sizes: np.ndarray, length: int, shift: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut to windows of at most `length`.

    Args:
        sizes: (documents,) of each.
        shift: below `length`: the first window of a document that needs several is so much shorter.

    Returns:
        Of each window its document, where it begins in that, and its size; all (windows,).
    """
    first = np.where(sizes > length, length - shift, length)
    count = 1 + np.maximum(0, -(-(sizes - first) // length))
    document = np.repeat(np.arange(len(sizes)), count)
    number = places(np.zeros_like(count), count)
    begin = np.where(number, first[document] + (number - 1) * length, 0)
    end = np.minimum(first[document] + number * length, sizes[document])
    return document, begin, end - begin


def choose_of_each(sizes: np.ndarray, wanted: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Choose exactly `wanted[i]` of the `sizes[i]` things of each group, every choice equally likely.

    Returns:
        (sum of sizes,) booleans, group behind group.
    """
    group = np.repeat(np.arange(len(sizes)), sizes)
    # the group above, chance below: sorted, a group's smallest numbers are at its beginning
    bits = 62 - max(len(sizes), 1).bit_length()
    keys = (group << bits) | random.integers(0, 1 << bits, len(group))
    ranked = np.sort(keys)
    last = np.full(len(sizes), -1, np.int64)
    some = wanted > 0
    last[some] = ranked[begins(sizes)[some] + wanted[some] - 1]
    return keys <= last[group]
