"""Rows as a model will see them, before anything is cut: how many tokens, which are targets, what would not fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lexmill.config import suggest
from lexmill.data.labelled import (
    KINDS_OF_TASKS,
    Row,
)
from lexmill.errors import ConfigError, DataError, ModelError
from lexmill.finetune.chat import chat_example
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.extractive import span_examples
from lexmill.finetune.prefer import CHOSEN, PROMPT, REJECTED, pair_example
from lexmill.finetune.writing import asking_of, fit_rows, made_examples
from lexmill.model.directory import ModelDirectory
from lexmill.tokenizer.pairs import encode_pairs
from lexmill.tokenizer.tokenizer import Tokenizer
from lexmill.train.examples import IGNORED, Example

_ENDLESS = 1 << 30  # tokens
_BARS = 12
_PERCENTILES = (50, 90, 95, 99)

Piece = tuple[str, bool]  # a text, and whether it is a target


@dataclass(frozen=True)
class Sketch:
    """One row in numbers.

    Attributes:
        examples: it becomes, at full length.
        parts: its texts as the model reads them, by name, each in pieces.
    """

    examples: list[Example]
    parts: Callable[[], list[tuple[str, list[Piece]]]]


@dataclass(kw_only=True)
class LengthReport:
    """Lengths of rows in tokens.

    Attributes:
        limit: tokens that a training row holds; `decoder_limit` those that are written.
        tokens: percentiles, "mean" and "longest" of what is read; `written` of what an encoder–decoder writes.
        histogram: (from, to, rows).
        targets: share of the tokens that count in the loss.
        too_long: rows of more than `limit` tokens; `shown` names the first ones with their lengths.
        without_targets: of them, those whose targets would all be cut off.
        unfit: rows of which no example can be made, and `unfit_shown` why.
    """

    limit: int
    rows: int = 0
    tokens: dict[str, float] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    targets: float = 0.0
    too_long: int = 0
    without_targets: int = 0
    shown: list[tuple[str, int]] = field(default_factory=list)
    unfit: int = 0
    unfit_shown: list[str] = field(default_factory=list)


class Lengths:
    """Measures rows one by one."""

    def __init__(self, task: str, model: ModelDirectory, config: FinetuneConfig, shown: int = 10) -> None:
        self._sketch = sketcher(task, model, config)
        self._limit, self._shown = config.length(model.config), shown
        self._sizes: list[int] = []
        self._written: list[int] = []
        self._targets = self._counted = 0
        self._report = LengthReport(limit=self._limit)

    def see(self, row: Row) -> None:
        """Measure one."""
        report = self._report
        try:
            examples = self._sketch(row).examples
        except DataError as error:
            report.unfit += 1
            if len(report.unfit_shown) < self._shown:
                report.unfit_shown.append(f"{row.origin}: {error}")
            return
        report.rows += 1
        size = max((len(one.tokens) for one in examples), default=0)
        written = max(
            (len(one.decoder_tokens) for one in examples if one.decoder_tokens is not None), default=0
        )
        self._sizes.append(size)
        self._written.append(written)
        for one in examples:
            self._targets += int((one.targets != IGNORED).sum())
            self._counted += len(one.targets)
        if max(size, written) > self._limit:
            report.too_long += 1
            if len(report.shown) < self._shown:
                report.shown.append((row.origin, max(size, written)))
            if all((one.targets[: self._limit] == IGNORED).all() for one in examples):
                report.without_targets += 1

    def report(self) -> LengthReport:
        """What was found."""
        report = self._report
        report.tokens = _figures(self._sizes)
        report.written = _figures(self._written) if any(self._written) else {}
        report.histogram = _histogram(self._sizes)
        report.targets = self._targets / max(self._counted, 1)
        return report


def _figures(sizes: Sequence[int]) -> dict[str, float]:
    if not sizes:
        return {}
    found = {f"{share} %": float(np.percentile(sizes, share)) for share in _PERCENTILES}
    return {"mean": round(float(np.mean(sizes)), 1), **found, "longest": float(max(sizes))}


def _histogram(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Bars of equal width up to the 99th percentile, and one for what is longer."""
    if not sizes:
        return []
    least, most = min(sizes) - 1, max(int(np.percentile(sizes, 99)), min(sizes))
    width = max(-(-(most - least) // _BARS), 1)
    edges = np.arange(least, most + width, width)
    counts = np.bincount(np.searchsorted(edges, sizes) - 1, minlength=len(edges))
    bars = [
        (int(low) + 1, int(high), int(count)) for (low, high), count in zip(itertools.pairwise(edges), counts)
    ]
    longer = int(counts[-1])
    return [*bars, *([(int(edges[-1]) + 1, max(sizes), longer)] if longer else [])]


def sketcher(task: str, model: ModelDirectory, config: FinetuneConfig) -> Callable[[Row], Sketch]:
    """What turns the rows of a task into examples, by the very functions that training uses.

    Raises:
        ConfigError: there is no such task.
        ModelError: the model cannot do it.
    """
    tokenizer = model.tokenizer
    shape = model.config.shape
    if task not in KINDS_OF_TASKS:
        raise ConfigError(f"There is no task '{task}'.", suggest(task, KINDS_OF_TASKS))
    if task in ("chat", "prefer") and not tokenizer.chat_template:
        raise ModelError(
            f"{model.path}: this model has no chat template, so a conversation cannot be written for it."
        )
    if task in ("classify", "embed") and shape != "encoder":
        raise ModelError(
            f"{model.path}: the task '{task}' needs an encoder; this model has the shape '{shape}'."
        )

    def chat(row: Any) -> Sketch:
        example = chat_example(row.messages, tokenizer)
        return Sketch([example], lambda: [("", _written(example.tokens, example.targets, tokenizer))])

    def prefer(row: Any) -> Sketch:
        example = pair_example(row, tokenizer)
        return Sketch([example], lambda: list(_pair_parts(example, tokenizer)))

    def classify(row: Any) -> Sketch:
        example = _pair_of_texts(row.text, row.second, tokenizer)
        example.targets[0] = 0
        read = tokenizer.decode(example.tokens.tolist())
        return Sketch([example], lambda: [("", [(read, False)]), ("label", [(row.label, True)])])

    def embed(row: Any) -> Sketch:
        texts = [
            ("query", row.query),
            ("positive", row.positive),
            *(("negative", one) for one in row.negatives),
        ]
        examples = [_pair_of_texts(text, None, tokenizer) for _, text in texts]
        read = [tokenizer.decode(one.tokens.tolist()) for one in examples]
        return Sketch(examples, lambda: [(name, [(one, False)]) for (name, _), one in zip(texts, read)])

    def span(row: Any) -> Sketch:
        found = span_examples(
            [row], tokenizer, min(config.window, config.length(model.config)), config.overlap
        )
        return Sketch(found.examples, lambda: list(_span_parts(found.examples, tokenizer)))

    if task in ("summarise", "translate", "qa") and not (task == "qa" and shape == "encoder"):
        asking = asking_of(config, model.config, KINDS_OF_TASKS[task])

        def write(row: Any) -> Sketch:
            fitted = fit_rows([row], asking, tokenizer, model.config, _ENDLESS, "error")
            examples = made_examples(
                fitted, 0, model.config.decoder_start if shape == "encoder_decoder" else None
            )
            return Sketch(examples, lambda: list(_written_parts(examples[0], tokenizer)))

        return write
    return {"chat": chat, "prefer": prefer, "classify": classify, "embed": embed, "qa": span}[task]


def _pair_of_texts(text: str, second: str | None, tokenizer: Tokenizer) -> Example:
    (pair,) = encode_pairs(tokenizer, [(text, second)])
    ids = np.array(pair.ids, np.int64)
    return Example(ids, np.full(len(ids), IGNORED, np.int64))


def _written(tokens: np.ndarray, targets: np.ndarray, tokenizer: Tokenizer) -> list[Piece]:
    """What a decoder reads and predicts: the first token, then each next one, which is a target or not."""
    ids = [int(tokens[0]), *(int(token) for token in tokens[1:])]
    marks = [False, *(bool(target != IGNORED) for target in targets[:-1])]
    if targets[-1] != IGNORED:  # the last token is only predicted
        ids.append(int(targets[-1]))
        marks.append(True)
    return _runs(ids, marks, tokenizer)


def _runs(ids: Sequence[int], marks: Sequence[bool], tokenizer: Tokenizer) -> list[Piece]:
    """Texts of ids, cut where targets begin and end."""
    pieces: list[Piece] = []
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or marks[place] != marks[start]:
            pieces.append((tokenizer.decode(list(ids[start:place])), bool(marks[start])))
            start = place
    return pieces


def _pair_parts(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, list[Piece]]]:
    assert example.segments is not None
    prompt = example.segments == PROMPT
    first = int(prompt.sum())  # the prompt's last token begins each reply
    ids = [*example.tokens[prompt].tolist(), int(example.tokens[first])]
    yield "prompt", [(tokenizer.decode(ids), False)]
    for name, segment in (("chosen", CHOSEN), ("rejected", REJECTED)):
        own = example.segments == segment
        pieces = _written(example.tokens[own], example.targets[own], tokenizer)
        yield name, pieces[1:] if pieces and not pieces[0][1] else pieces


def _span_parts(examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[tuple[str, list[Piece]]]:
    for number, example in enumerate(examples, 1):
        begin, end = (int(place) for place in example.targets[:2])
        ids = example.tokens.tolist()
        marks = [begin <= place <= end for place in range(len(ids))]
        yield f"window {number}" if len(examples) > 1 else "", _runs(ids, marks, tokenizer)


def _written_parts(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, list[Piece]]]:
    if example.decoder_tokens is None:
        yield "", _written(example.tokens, example.targets, tokenizer)
        return
    yield "read", [(tokenizer.decode(example.tokens.tolist()), False)]
    yield "written", [(tokenizer.decode(example.targets.tolist()), True)]
