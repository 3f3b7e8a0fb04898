"""What an encoder's task head says: labels with probabilities, and answers found in a text. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lexmill.errors import DataError, ModelError
from lexmill.tokenizer.pairs import SECOND, Pair, encode_pairs, windows
from lexmill.tokenizer.tokenizer import Tokenizer

WINDOW, OVERLAP = 384, 128  # tokens, where a model's lexmill.json says nothing (Devlin et al. 2019)
LONGEST_ANSWER = 30  # tokens
_KEPT = 20  # beginnings and ends that are tried in each window
_FEWEST = 8  # tokens of a window

# (pairs) -> a row of logits for each, or for each of its tokens
HeadLogits = Callable[[Sequence[Pair]], Sequence[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a text says to a question.

    Attributes:
        text: as it stands in the text; "" where it does not say.
        start, end: its characters in the text; 0 and 0 where there is none.
        probability: among the candidates and "no answer".
        null_score: by how much "no answer" scores above the best answer, in logits.
        candidate: the best answer, whatever `null_score` says.
    """

    text: str
    start: int
    end: int
    probability: float
    null_score: float
    candidate: str


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How a model was made to answer; `calibration` in its `lexmill.json`."""

    window: int = WINDOW  # tokens of question and context together that are read at once
    overlap: int = OVERLAP  # tokens of the context that neighbouring windows share
    null_threshold: float | None = 0.0  # above this `null_score` it says that there is no answer; None: never

    @classmethod
    def of(cls, lineage: Mapping[str, Any], context: int) -> AnswerSettings:
        """Those that a model was made with, as far as its files say them sensibly."""
        said = lineage.get("calibration")
        said = said if isinstance(said, Mapping) and said.get("task") == "qa" else {}
        threshold = said.get("null_threshold", 0.0)
        real = isinstance(threshold, (int, float)) and math.isfinite(threshold)
        window = _whole(said.get("window"), min(WINDOW, context))
        window = min(max(window, _FEWEST), context)
        return cls(
            window=window,
            overlap=min(_whole(said.get("overlap"), OVERLAP), window // 2),
            null_threshold=float(threshold) if real else None,
        )


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


def temperature_of(lineage: Mapping[str, Any]) -> float:
    """What a classifier's logits are divided by; 1 where it was not calibrated."""
    said = lineage.get("calibration")
    value = said.get("temperature") if isinstance(said, Mapping) else None
    return float(value) if isinstance(value, (int, float)) and 0 < value < math.inf else 1.0


def label_probabilities(
    logits: np.ndarray, labels: Sequence[str], temperature: float
) -> list[dict[str, float]]:
    """For each row of `logits`, (n, labels), the probability of every label, the likeliest first."""
    scores = logits.astype(np.float64) / temperature
    scores -= scores.max(-1, keepdims=True)
    shares = np.exp(scores)
    shares /= shares.sum(-1, keepdims=True)
    return [{labels[index]: float(row[index]) for index in np.argsort(-row, kind="stable")} for row in shares]


def by_length(pairs: Sequence[Pair], compute: HeadLogits, rows: int) -> list[np.ndarray]:
    """What `compute` gives for each pair; pairs of like lengths are computed together, `rows` at once."""
    found: list[np.ndarray] = [np.zeros(0)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index]))
    for start in range(0, len(order), rows):
        members = order[start : start + rows]
        for index, logits in zip(members, compute([pairs[member] for member in members]), strict=True):
            found[index] = logits
    return found


def find_answers(
    tokenizer: Tokenizer,
    questions: Sequence[tuple[str, str]],
    settings: AnswerSettings,
    compute: HeadLogits,
    rows: int = 16,
) -> list[Answer]:
    """The answers to questions, each with its context.

    A context longer than a window is read in overlapping ones, and the best answer of all is taken; "no answer"
    is the first token, as sure as in the window that is least sure of it (Devlin et al. 2019, section 4.3).

    Args:
        questions: (question, context).
        compute: gives (tokens, 2) logits of windows: how well an answer begins and ends at each token.

    Raises:
        DataError: an empty question or context; says which.
    """
    pieces: list[Pair] = []
    owners: list[int] = []
    for number, (question, context) in enumerate(questions):
        for name, text in (("question", question), ("context", context)):
            if not text.strip():
                raise DataError(f"The {name} of question {number + 1:,} is empty.")
        pair = encode_pairs(tokenizer, [(question, context)])[0]
        cut = windows(pair, context, settings.window, settings.overlap)
        pieces += cut
        owners += [number] * len(cut)
    logits = by_length(pieces, compute, rows)
    spans: list[list[tuple[float, int, int]]] = [[] for _ in questions]
    null = np.full(len(questions), np.inf)
    for owner, piece, scores in zip(owners, pieces, logits, strict=True):
        null[owner] = min(null[owner], float(scores[0].sum()))
        spans[owner] += best_spans(piece, scores)
    return [
        _choose(context, spans[number], float(null[number]), settings.null_threshold)
        for number, (_, context) in enumerate(questions)
    ]


def best_spans(window: Pair, logits: np.ndarray) -> list[tuple[float, int, int]]:
    """The likeliest answers in a window, best first: score, and the characters where it begins and ends.

    Args:
        logits: (tokens, 2).
    """
    inside = np.flatnonzero((window.part == SECOND) & (window.ends > window.begins))
    if not len(inside):
        return []
    start, end = logits[inside, 0].astype(np.float64), logits[inside, 1].astype(np.float64)
    scores = start[:, None] + end[None, :]
    length = np.arange(len(inside))[None, :] - np.arange(len(inside))[:, None]
    scores[(length < 0) | (length >= LONGEST_ANSWER)] = -np.inf
    flat = scores.ravel()
    most = min(_KEPT, flat.size)
    best = np.argpartition(-flat, most - 1)[:most]
    best = best[np.argsort(-flat[best], kind="stable")]
    found = []
    for index in best.tolist():
        first, last = divmod(index, len(inside))
        if math.isfinite(flat[index]):
            found.append(
                (float(flat[index]), int(window.begins[inside[first]]), int(window.ends[inside[last]]))
            )
    return found


def _choose(
    context: str, spans: list[tuple[float, int, int]], null: float, threshold: float | None
) -> Answer:
    """The best of all windows; the same characters in two windows count once, as the better one."""
    best: dict[tuple[int, int], float] = {}
    for score, begin, end in spans:
        best[begin, end] = max(best.get((begin, end), -math.inf), score)
    ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:_KEPT]
    if not ranked:
        return Answer(text="", start=0, end=0, probability=1.0, null_score=math.inf, candidate="")
    (begin, end), score = ranked[0]
    scores = np.array([value for _, value in ranked] + [null])
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    difference = null - score
    silent = threshold is not None and difference > threshold
    return Answer(
        text="" if silent else context[begin:end],
        start=0 if silent else begin,
        end=0 if silent else end,
        probability=float(shares[-1] if silent else shares[0]),
        null_score=difference,
        candidate=context[begin:end],
    )


def require_labels(labels: Sequence[str]) -> None:
    """Refuse a model that has no labels.

    Raises:
        ModelError: it has none, or one, which is a score and no label.
    """
    if not labels:
        raise ModelError(
            "This model has no head that tells labels apart.",
            "Give it one: lexmill finetune MODEL --task classify --data FILE --out DIR",
        )
    if len(labels) == 1:
        raise ModelError(f"This model gives one score, '{labels[0]}', and no labels to choose from.")
