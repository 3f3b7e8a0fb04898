"""Labelled rows: what a task learns from and is scored on, whatever form a file has them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One labelled example. `origin` is where it comes from: "train.jsonl, row 3"."""

    origin: str


@dataclass(frozen=True, kw_only=True)
class Conversation(Row):
    """Chat: messages of which the assistant's are to be learned."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Question(Row):
    """A question about a context, as SQuAD has them.

    Attributes:
        answers: all that count as right; none where the context does not answer.
        starts: where each begins in `context`, in characters.
        id: the question's own.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class TextPair(Row):
    """A text and what shall be written of it: a summary, a translation. Several targets are references."""

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LabelledText(Row):
    """A text, or a pair of texts, and its label."""

    text: str
    second: str | None = None
    label: str


@dataclass(frozen=True, kw_only=True)
class Preference(Row):
    """A prompt, and two replies of which the first is preferred."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True)
class Match(Row):
    """A query, a text that belongs to it, and perhaps some that look as if they did."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
