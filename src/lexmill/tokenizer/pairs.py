"""Pairs of texts as ids, of which each token knows its characters; cut to a length, or into overlapping windows."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lexmill.tokenizer.fast import panics_as_errors, refuse_surrogates
from lexmill.tokenizer.tokenizer import Tokenizer

FRAME, FIRST, SECOND = -1, 0, 1  # what a token belongs to


@dataclass(frozen=True, eq=False)
class Pair:
    """Two texts, or one, as a model reads them; all arrays are (n,).

    Attributes:
        ids: with what stands around the texts ([CLS], [SEP]).
        segments: 0 or 1, as the model takes them.
        part: FIRST, SECOND, or FRAME for what is of neither text.
        begins, ends: the characters of its own text that a token stands for; 0 and 0 in the frame.
    """

    ids: np.ndarray
    segments: np.ndarray
    part: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, kept: np.ndarray) -> Pair:
        """Some of the tokens."""
        return Pair(self.ids[kept], self.segments[kept], self.part[kept], self.begins[kept], self.ends[kept])


def read_pair(ids: Sequence[int], segments: Sequence[int]) -> Pair:
    """A pair of which only the ids and segments are known."""
    nothing = np.zeros(len(ids), np.int64)
    return Pair(np.array(ids, np.int64), np.array(segments, np.int64), nothing, nothing, nothing)


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str | None]]) -> list[Pair]:
    """Pairs as `Tokenizer.encode_pair` gives their ids; where there is no second text, as `encode` does.

    Raises:
        DataError: a lone surrogate.
        ModelError: a tokenizer that cannot frame pairs.
    """
    return [
        _alone(tokenizer, first) if second is None else _together(tokenizer, first, second)
        for first, second in pairs
    ]


def _alone(tokenizer: Tokenizer, text: str) -> Pair:
    ids, offsets = tokenizer.encode_with_offsets(text)
    begins, ends = _columns(offsets)
    special = np.array([end == begin for begin, end in offsets], bool)
    return Pair(
        np.array(ids, np.int64),
        np.zeros(len(ids), np.int64),
        np.where(special, FRAME, FIRST),
        begins,
        ends,
    )


def _together(tokenizer: Tokenizer, first: str, second: str) -> Pair:
    if tokenizer.frames_pairs:
        refuse_surrogates([first, second])
        with panics_as_errors("The tokenizer cannot encode these texts"):
            found = tokenizer.fast.encode(first, second)
        part = [FRAME if one is None else one for one in found.sequence_ids]
        ids, segments, offsets = found.ids, found.type_ids, found.offsets
    else:
        cls, sep = tokenizer.require_separators()
        one, two = (tokenizer.encode_with_offsets(text, frame=False) for text in (first, second))
        ids = [cls, *one[0], sep, *two[0], sep]
        part = [FRAME, *[FIRST] * len(one[0]), FRAME, *[SECOND] * len(two[0]), FRAME]
        segments = [0] * (len(one[0]) + 2) + [1] * (len(two[0]) + 1)
        offsets = [(0, 0), *one[1], (0, 0), *two[1], (0, 0)]
    begins, ends = _columns(offsets)
    framed = np.array(part, np.int64)
    return Pair(
        np.array(ids, np.int64),
        np.array(segments, np.int64),
        framed,
        np.where(framed == FRAME, 0, begins),
        np.where(framed == FRAME, 0, ends),
    )


def _columns(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(offsets, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def cut(pair: Pair, length: int) -> Pair:
    """At most `length` tokens: the longer text loses its last ones until both are equally long, then both do."""
    over = len(pair) - length
    if over <= 0:
        return pair
    first, second = (int((pair.part == part).sum()) for part in (FIRST, SECOND))
    room = max(first + second - over, 0)
    # the longer one takes what the shorter one leaves; where both are long, each has half
    half = (room + 1) // 2
    kept = max(room - second, half) if first > second else min(first, half)
    kept = min(kept, first, room)
    order = np.zeros(len(pair), np.int64)  # of each token in its text
    for part in (FIRST, SECOND):
        mine = pair.part == part
        order[mine] = np.arange(int(mine.sum()))
    stays = (
        (pair.part == FRAME)
        | ((pair.part == FIRST) & (order < kept))
        | ((pair.part == SECOND) & (order < room - kept))
    )
    return pair.select(stays)


def windows(pair: Pair, context: str, length: int, overlap: int) -> list[Pair]:
    """The second text in pieces, each behind the whole first one, in at most `length` tokens.

    A first text of more than half a window is cut to that. Tokens of the second text stand for their
    characters without spaces at their sides, but with accents that the tokenizer drops.

    Args:
        context: the second text.
        overlap: tokens that a piece has in common with the one before.
    """
    inside = np.flatnonzero(pair.part == SECOND)
    if len(inside):
        pair = _tight(pair, context, inside)
    question = np.flatnonzero(pair.part == FIRST)
    extra = question[max(length // 2, 1) :]
    if len(extra):
        keep = np.ones(len(pair), bool)
        keep[extra] = False
        pair = pair.select(keep)
        inside = np.flatnonzero(pair.part == SECOND)
    room = max(length - (len(pair) - len(inside)), 1)
    step = max(room - overlap, 1)
    found = []
    for start in range(0, max(len(inside), 1), step):
        keep = pair.part != SECOND
        keep[inside[start : start + room]] = True
        found.append(pair.select(keep))
        if start + room >= len(inside):
            break
    return found


def _tight(pair: Pair, text: str, inside: np.ndarray) -> Pair:
    """Characters without spaces around them; what follows a token and is of none, such as an accent, joins it."""
    begins, ends = pair.begins.copy(), pair.ends.copy()
    following = np.append(begins[inside][1:], len(text))
    for index, nearest in zip(inside.tolist(), following.tolist()):
        begin, end = int(begins[index]), int(ends[index])
        while begin < end and text[begin].isspace():
            begin += 1
        while end > begin and text[end - 1].isspace():
            end -= 1
        while end > begin and end < nearest and unicodedata.category(text[end]).startswith("M"):
            end += 1
        begins[index], ends[index] = begin, end
    return replace(pair, begins=begins, ends=ends)


def tokens_of(window: Pair, begin: int, end: int) -> tuple[int, int, bool] | None:
    """The tokens of a window's second text that hold the characters `begin` to `end`.

    Returns:
        The first and the last token, and whether they stand for exactly these characters; None where not all of
        them are in this window.
    """
    inside = np.flatnonzero((window.part == SECOND) & (window.ends > window.begins))
    if not len(inside) or end <= begin:
        return None
    begins, ends = window.begins[inside], window.ends[inside]
    first = int(np.searchsorted(ends, begin, side="right"))
    last = int(np.searchsorted(begins, end, side="left")) - 1
    if first > last or first == len(inside) or begin < begins[0] or end > ends[-1]:
        return None
    exact = bool(begins[first] == begin and ends[last] == end)
    return int(inside[first]), int(inside[last]), exact
