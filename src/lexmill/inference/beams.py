"""Beam search: the likeliest continuation as a whole, not token by token (Graves 2012; Wu et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lexmill.errors import ConfigError
from lexmill.inference.sampling import log_softmax


class RowsSession(Protocol):
    """A backend that continues several texts side by side."""

    context: int

    def read_rows(self, rows: Sequence[Sequence[int]]) -> np.ndarray: ...
    def reorder(self, rows: Sequence[int]) -> None: ...


@dataclass(frozen=True)
class Hypothesis:
    """One continuation: its ids without the one that ends it, and the sum of its log-probabilities in nats."""

    ids: tuple[int, ...]
    logprob: float
    score: float  # logprob / length ** length_penalty, by which hypotheses are compared
    ended: bool  # by an end-of-text id, not by the limit


def beam_search(
    session: RowsSession,
    prompt: Sequence[int],
    stop: Sequence[int],
    *,
    beams: int,
    max_tokens: int,
    length_penalty: float = 1.0,
) -> list[Hypothesis]:
    """The best `beams` continuations of `prompt`, best first.

    Args:
        session: has read nothing yet (of the text that is written).
        stop: ids that end a text.
        length_penalty: the power of the length that scores are divided by; above 1 favours long texts.

    The search ends when no running beam can still beat the worst kept hypothesis, as in
    transformers' `generate` with `early_stopping=False`; lengths count the id that ends a text.

    Raises:
        ConfigError: fewer than one beam.
    """
    return beam_searches(
        session, [prompt], stop, beams=beams, max_tokens=max_tokens, length_penalty=length_penalty
    )[0]


def beam_searches(
    session: RowsSession,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[int],
    *,
    beams: int,
    max_tokens: int,
    length_penalty: float = 1.0,
) -> list[list[Hypothesis]]:
    """The same for several texts side by side; what is found for one does not depend on the others."""
    if beams < 1:
        raise ConfigError(f"'beams' must be at least 1, but is {beams}.")
    max_tokens = min(max_tokens, session.context - max(map(len, prompts)))
    searches = [_Search(beams, frozenset(stop), length_penalty) for _ in prompts]
    going = searches
    logits = session.read_rows([list(prompt) for prompt in prompts])
    for length in range(1, max_tokens + 1):
        logprobs, start, sources = log_softmax(logits), 0, []
        for search in going:
            end = start + len(search.running)
            chosen = search.advance(logprobs[start:end], length)
            sources += [start + row for row in chosen]
            start = end
        going = [search for search in going if not search.done]
        if not going:
            break
        if length < max_tokens:
            session.reorder(sources)
            logits = session.read_rows([[beam.ids[-1]] for search in going for beam in search.running])
    return [search.best() for search in searches]


class _Search:
    """The beams of one text."""

    def __init__(self, beams: int, stop: frozenset[int], length_penalty: float) -> None:
        self._beams, self._stop, self._penalty = beams, stop, length_penalty
        self._finished: list[Hypothesis] = []
        self.running = [Hypothesis((), 0.0, 0.0, False)]
        self.done = False

    def advance(self, logprobs: np.ndarray, length: int) -> list[int]:
        """Make each text one token longer; which of the running ones each new one goes on from, if any does.

        Args:
            logprobs: (running, vocabulary).
        """
        totals = logprobs + np.array([beam.logprob for beam in self.running])[:, None]
        vocabulary = totals.shape[1]
        flat = totals.ravel()
        wanted = min(self._beams * (1 + max(len(self._stop), 1)), flat.size)
        best = np.argpartition(-flat, wanted - 1)[:wanted]
        best = best[np.argsort(-flat[best], kind="stable")]
        chosen: list[Hypothesis] = []
        sources: list[int] = []
        for rank, index in enumerate(best):
            row, token = divmod(int(index), vocabulary)
            total = float(flat[index])
            score = total / length**self._penalty
            if token in self._stop:
                if rank < self._beams:  # an end among the lesser candidates is no rival of theirs
                    self._finished.append(Hypothesis(self.running[row].ids, total, score, True))
                continue
            chosen.append(Hypothesis((*self.running[row].ids, token), total, score, False))
            sources.append(row)
            if len(chosen) == self._beams:
                break
        self._finished = sorted(self._finished, key=lambda one: -one.score)[: self._beams]
        self.running = chosen
        full = len(self._finished) == self._beams
        self.done = not chosen or (full and chosen[0].score <= self._finished[-1].score)
        return [] if self.done else sources

    def best(self) -> list[Hypothesis]:
        """What was found, best first; what the limit cut off counts too."""
        found = self._finished if self.done and self._finished else self._finished + self.running
        return sorted(found, key=lambda one: -one.score)[: self._beams]
