"""Guesses at the next tokens, which a model checks in one step: the text is the same, and comes sooner.

A guess is kept only where it is the very token that would have been chosen without it. That is also exact for
sampling: a guess x is a distribution of one point, and to draw from p and keep x if x is drawn is the rule of
Leviathan et al. 2023 and Chen et al. 2023 for such a one; with one draw a token even the seed gives the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lexmill.inference.native.interface import CHUNK, Batch, Engine
from lexmill.inference.native.pages import OutOfPages, PageStore, Table

MOST_GUESSES = 16  # tokens
_GRAMS = (4, 3, 2)  # tokens that must have stood before in this order; the longest match counts
_FADES = 0.97  # what a measurement weighs after the next one
_OVERHEAD = 0.02  # the share of time that may go into trying guesses that do not pay


class Drafter(Protocol):
    """Guesses how a text goes on."""

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens behind `ids`, which only ever grow from call to call."""
        ...

    def close(self) -> None:
        """The text is done."""
        ...


class PromptLookup:
    """Guesses that what stood behind the last few tokens before comes again (Saxena 2023)."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}  # of a run of tokens: where its last but one ended
        self._known = 0

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        for end in range(max(self._known, 1), len(ids)):  # the run that ends the text is what is looked for
            for size in _GRAMS:
                if end >= size:
                    self._places[tuple(ids[end - size : end])] = end
        self._known = len(ids)
        for size in _GRAMS:
            place = self._places.get(tuple(ids[-size:])) if len(ids) >= size else None
            if place is not None:
                return list(ids[place : place + most])
        return []

    def close(self) -> None:
        pass


class DraftModel:
    """A small model with the same tokenizer; `of_text` gives a drafter for each text.

    Args:
        engine: its own, which nobody else uses.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.store = engine, PageStore(engine.pages)

    def of_text(self) -> Drafter:
        return _Drafts(self.engine, self.store)


class _Drafts:
    """What the small model has read of one text."""

    def __init__(self, engine: Engine, store: PageStore) -> None:
        self._engine, self._table = engine, Table(store)
        self._read: list[int] = []

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        known = 0  # the last guesses may have been wrong
        limit = min(len(self._read), len(ids) - 1)
        while known < limit and self._read[known] == ids[known]:
            known += 1
        most = min(most, self._engine.context - len(ids))
        text, found = list(ids), list[int]()
        try:
            while len(found) < most:
                token = int(self._compute(text, known).argmax())
                known = len(text)
                text.append(token)
                found.append(token)
        except OutOfPages:
            self.close()
        return found

    def _compute(self, text: list[int], known: int) -> np.ndarray:
        """Read `text[known:]`; the logits behind it."""
        self._table.reserve(known, len(text))
        logits = np.zeros((0, 0), np.float32)
        for start in range(known, len(text), CHUNK):
            part = np.arange(start, min(start + CHUNK, len(text)), dtype=np.int32)
            last = int(part[-1]) == len(text) - 1
            batch = Batch(
                tokens=np.array(text[start : int(part[-1]) + 1], np.int32),
                positions=part,
                rows=np.zeros(len(part), np.int32),
                tables=np.array([self._table.pages], np.int32),
                wanted=np.array([len(part) - 1] if last else [], np.int32),
                prompt=len(part) > MOST_GUESSES,
            )
            logits = self._engine.forward(batch)
        self._read = list(text)
        return logits[0]

    def close(self) -> None:
        self._table.free()
        self._read = []


class Pace:
    """How many guesses a step should check, by what steps took: `seconds = fixed + each · tokens`."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)  # of 1, tokens, tokens², seconds, tokens · seconds; fading

    def measured(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens, guesses among them, took so long."""
        if self._sums[0] > 5:  # what else a machine does must not count for much
            fixed, each = self.costs
            seconds = min(seconds, 3 * (fixed + each * tokens))
        row = np.array([1, tokens, tokens**2, seconds, tokens * seconds])
        self._sums = _FADES * self._sums + row

    @property
    def costs(self) -> tuple[float, float]:
        """Seconds of a step, and of each token in it."""
        count, tokens, squares, seconds, products = self._sums.tolist()
        if not count:
            return 1.0, 0.3
        mean, time = tokens / count, seconds / count
        spread = squares / count - mean**2
        # before batches differ in size: a guess that lets guesses be tried
        slope = (products / count - mean * time) / spread if spread > 0.01 else 0.25 * time / mean
        slope = min(max(slope, 0.02 * time / mean), time / mean)
        return max(time - slope * mean, 0.0), slope

    def best(self, rate: float, rows: int, most: int) -> int:
        """How many guesses bring the most tokens a second.

        Args:
            rate: the share of guesses that come true.
            rows: texts in a step, which share what a step costs.
        """
        fixed, each = self.costs
        fixed /= max(rows, 1)
        best, count, expected, chance = 0.0, 0, 0.0, 1.0  # without NumPy, which takes longer for so few
        for guesses in range(most + 1):
            expected += chance
            chance *= rate
            speed = expected / (fixed + each * (guesses + 1))
            if speed > best:
                best, count = speed, guesses
        return count


class Speculation:
    """The guesses for one text: as many as have paid lately."""

    def __init__(self, drafter: Drafter, pace: Pace) -> None:
        self._drafter, self._pace = drafter, pace
        self._right, self._tried = 1.0, 2.0  # fading counts; a half before anything is known
        self._spared = 0.0  # steps without guesses, from which those that do not pay are paid
        self._offered = 0

    def propose(self, ids: Sequence[int], most: int, rows: int) -> list[int]:
        """Guesses behind `ids`, or none; `learn` follows where they were tried."""
        self._spared = min(self._spared + 1, 1000)
        self._offered = 0
        most = min(most, MOST_GUESSES)
        if most < 1:
            return []
        count = self._pace.best(self._right / self._tried, rows, most)
        if not count:  # now and then a few are tried all the same
            fixed, each = self._pace.costs
            count = min(2, most)
            share = count * each / (fixed / max(rows, 1) + each)
            if _OVERHEAD * self._spared < share:
                return []
        found = self._drafter.propose(ids, count)
        if found:
            self._spared = 0
        self._offered = len(found)
        return found

    def learn(self, kept: int) -> None:
        """So many of the last guesses came true. What came from elsewhere does not count."""
        if self._offered:
            self._right = 0.9 * self._right + kept
            self._tried = 0.9 * self._tried + min(kept + 1, self._offered)
            self._offered = 0

    def close(self) -> None:
        self._drafter.close()
