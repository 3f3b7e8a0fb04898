"""Labelled rows: what a task learns from and is scored on, whatever form a file has them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# "role" and "content"; an assistant's message with "weight": "0" is not to be learned
Message = Mapping[str, str]

FormName = Literal[
    "messages",
    "alpaca",
    "sharegpt",
    "prompt-completion",
    "squad",
    "source-target",
    "text-label",
    "chosen-rejected",
    "query-positive",
]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the columns of a form are called in a file, where they are not called so: `text = "review"`."""

    messages: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    system: str | None = None
    history: str | None = None
    conversations: str | None = None
    prompt: str | None = None
    completion: str | None = None
    id: str | None = None
    question: str | None = None
    context: str | None = None
    answers: str | None = None
    source: str | None = None
    target: str | None = None
    text: str | None = None
    second: str | None = None
    label: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    query: str | None = None
    positive: str | None = None
    negatives: str | None = None


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How the rows of a file are to be read; part of the settings of fine-tuning and of scoring."""

    form: FormName | None = None  # recognised by the first rows when not given
    columns: Columns = field(default_factory=Columns)
    # an answer that does not stand where "answer_start" says: "mend" looks for the nearest place where it does
    wrong_starts: Literal["refuse", "mend"] = "refuse"
    bad_rows: Literal["refuse", "skip"] = "refuse"  # rows that cannot be used: an error, or left out


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
        starts: where each begins in `context`, in characters; -1 where it does not stand there at all
            (with `wrong_starts = "mend"` only).
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


# what a task asks for, as an error says it
KINDS: dict[type[Row], str] = {
    Conversation: "conversations",
    Question: "questions about a context",
    TextPair: "pairs of source and target",
    LabelledText: "texts with a label",
    Preference: "chosen and rejected replies",
    Match: "queries with a text that belongs to them",
}


# What each task learns from and is scored on, whatever the model.
KINDS_OF_TASKS: dict[str, type[Row]] = {
    "chat": Conversation,
    "classify": LabelledText,
    "embed": Match,
    "prefer": Preference,
    "qa": Question,
    "summarise": TextPair,
    "translate": TextPair,
}
