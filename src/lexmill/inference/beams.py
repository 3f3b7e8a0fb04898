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
    if beams < 1:
        raise ConfigError(f"'beams' must be at least 1, but is {beams}.")
    max_tokens = min(max_tokens, session.context - len(prompt))
    finished: list[Hypothesis] = []
    running = [Hypothesis((), 0.0, 0.0, False)]
    logits = session.read_rows([list(prompt)])
    for length in range(1, max_tokens + 1):
        totals = log_softmax(logits) + np.array([beam.logprob for beam in running])[:, None]
        vocabulary = totals.shape[1]
        flat = totals.ravel()
        wanted = min(beams * (1 + max(len(stop), 1)), flat.size)
        best = np.argpartition(-flat, wanted - 1)[:wanted]
        best = best[np.argsort(-flat[best], kind="stable")]
        chosen, sources = [], []
        for rank, index in enumerate(best):
            row, token = divmod(int(index), vocabulary)
            total = float(flat[index])
            score = total / length**length_penalty
            if token in stop:
                if rank < beams:  # an end among the lesser candidates is no rival of theirs
                    finished.append(Hypothesis(running[row].ids, total, score, True))
                continue
            chosen.append(Hypothesis((*running[row].ids, token), total, score, False))
            sources.append(row)
            if len(chosen) == beams:
                break
        finished = sorted(finished, key=lambda one: -one.score)[:beams]
        running = chosen
        if not running or (len(finished) == beams and running[0].score <= finished[-1].score):
            break
        if length < max_tokens:
            session.reorder(sources)
            logits = session.read_rows([[beam.ids[-1]] for beam in running])
    else:
        finished += running
    return sorted(finished or running, key=lambda one: -one.score)[:beams]
