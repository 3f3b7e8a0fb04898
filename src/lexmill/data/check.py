"""What is wrong with a file of labelled rows, all of it at once: bad rows, repeated rows, rows of both splits, labels."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lexmill.data.forms import RowFile, group_id
from lexmill.data.labelled import (
    Conversation,
    LabelledText,
    Match,
    Preference,
    Question,
    Row,
    RowSettings,
    TextPair,
)
from lexmill.data.splitting import assign_split
from lexmill.errors import DataError
from lexmill.progress import SILENT, Progress

_PUNCTUATION = re.compile(r"[\W_]+")
_VALIDATION = "validation"


@dataclass(kw_only=True)
class Overlap:
    """Rows that occur before or elsewhere, each counted once, by the nearest likeness.

    Attributes:
        exact: the whole row is the same.
        near: but for case, punctuation, width and white space.
        prompt: what is asked is the same (but for those), the answer is not.
        context: of questions, the context is the same.
        shown: the first ones: which row, like which, how near.
    """

    exact: int = 0
    near: int = 0
    prompt: int = 0
    context: int = 0
    shown: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows that are the same or nearly."""
        return self.exact + self.near

    def add(self, how: str, origin: str, other: str, most: int) -> None:
        """Count one."""
        setattr(self, how, getattr(self, how) + 1)
        # rows of one context are many by nature and stand in nobody's way
        if len(self.shown) < most and how != "context":
            self.shown.append((origin, other, how))


@dataclass(kw_only=True)
class FileReport:
    """What a file of rows holds.

    Attributes:
        form: what its rows look like; `forms` counts all that occur, "" for none.
        rows: that can be used; `bad` cannot, and `errors` are those of the first ones, in words.
        dropped: what is not used of the rows, and how often.
        duplicates: rows that repeat an earlier one.
        leakage: held-out rows that training has too; `compared` says between what.
        labels: how many rows of which label; `contradictions` are texts that occur with several.
    """

    path: str
    form: str = ""
    forms: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    bad: int = 0
    errors: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    duplicates: Overlap = field(default_factory=Overlap)
    leakage: Overlap = field(default_factory=Overlap)
    compared: str = ""
    labels: dict[str, int] = field(default_factory=dict)
    contradictions: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_rows(
    path: Path,
    settings: RowSettings | None = None,
    kind: type[Row] | None = None,
    *,
    against: Path | None = None,
    fraction: float = 0.05,
    seed: int = 0,
    shown: int = 10,
    see: Callable[[Row], None] | None = None,
    total: int | None = None,
    progress: Progress = SILENT,
) -> FileReport:
    """Read a whole file and say what is in it; bad rows do not stop the reading.

    Args:
        against: a file of training rows, of which none should occur in this one; when not given, what
            validation would hold out is compared with the rest.
        fraction, seed: of validation.
        shown: bad rows, repeated rows and leaks that are named, at most.
        see: is given each good row.
        total: about how many rows there are, for the progress bar.

    Raises:
        FileError, DataError: the file cannot be read at all, or its form is not known.
    """
    file, report = RowFile(path, settings, kind), FileReport(path=str(path))
    seen, training = _Seen(), _Seen()
    held_out: list[tuple[str, _Keys]] = []
    labels: Counter[str] = Counter()
    by_text: dict[bytes, set[str]] = {}
    if against is not None:
        report.compared = f"{path} and {against}"
        with progress.task(f"reading {against.name}", None, "rows") as task:
            for row in RowFile(against, settings, kind).rows(lambda error: None):
                training.add(_Keys.of(row), row.origin)
                task.advance()
    elif fraction:
        report.compared = f"what is held out ({100 * fraction:g} %) and the rest"

    def reject(error: DataError) -> None:
        report.bad += 1
        if len(report.errors) < shown:
            report.errors.append(str(error))

    with progress.task("reading", total, "rows") as task:
        for row in file.rows(reject):
            report.rows += 1
            keys = _Keys.of(row)
            seen.count(report.duplicates, keys, row.origin, shown)
            seen.add(keys, row.origin)
            if against is not None:
                training.count(report.leakage, keys, row.origin, shown)
            elif fraction and assign_split(group_id(row), seed, fraction) == _VALIDATION:
                held_out.append((row.origin, keys))
            elif fraction:
                training.add(keys, row.origin)
            if isinstance(row, LabelledText):
                labels[row.label] += 1
                by_text.setdefault(keys.prompt, set()).add(row.label)
            if see:
                see(row)
            task.advance(note=f"{report.bad:,} bad" if report.bad else None)
    for origin, keys in held_out:
        training.count(report.leakage, keys, origin, shown)
    report.form = file.form.name if file.form else ""
    report.forms, report.dropped = dict(file.looks), dict(file.dropped.most_common())
    report.labels = dict(labels.most_common())
    report.contradictions = sum(len(names) > 1 for names in by_text.values())
    return report


@dataclass(frozen=True)
class _Keys:
    """A row as hashes: of all of it, of all of it normalised, of what it asks normalised, of its context."""

    whole: bytes
    near: bytes
    prompt: bytes
    context: bytes | None

    @classmethod
    def of(cls, row: Row) -> _Keys:
        asked, answered = _texts(row)
        context = _hash([normalised(row.context)]) if isinstance(row, Question) else None
        near = [normalised(text) for text in asked]
        return cls(
            _hash([*asked, "\0", *answered]),
            _hash([*near, "\0", *map(normalised, answered)]),
            _hash(near),
            context,
        )


class _Seen:
    """The rows so far, and where the first of each kind stood."""

    def __init__(self) -> None:
        self._first: dict[str, dict[bytes, str]] = {"exact": {}, "near": {}, "prompt": {}, "context": {}}

    def add(self, keys: _Keys, origin: str) -> None:
        for how, key in self._by_nearness(keys):
            self._first[how].setdefault(key, origin)

    def count(self, overlap: Overlap, keys: _Keys, origin: str, most: int) -> None:
        """Note a row if it was seen before, by its nearest likeness."""
        for how, key in self._by_nearness(keys):
            if key in self._first[how]:
                overlap.add(how, origin, self._first[how][key], most)
                return

    @staticmethod
    def _by_nearness(keys: _Keys) -> list[tuple[str, bytes]]:
        found = [("exact", keys.whole), ("near", keys.near), ("prompt", keys.prompt)]
        return found if keys.context is None else [*found, ("context", keys.context)]


def normalised(text: str) -> str:
    """A text without what two copies of it may differ in: case, punctuation, white space, width of letters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _PUNCTUATION.sub(" ", folded).strip() or folded.strip()


def _hash(texts: list[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=12)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(b"\x1f")
    return digest.digest()


def _texts(row: Row) -> tuple[list[str], list[str]]:
    """What a row asks, and what is answered."""
    if isinstance(row, Conversation):
        last = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
        said = [message["content"] for message in row.messages]
        return said[:last], said[last:]
    if isinstance(row, Preference):
        return [message["content"] for message in row.messages], [row.chosen, row.rejected]
    if isinstance(row, Question):
        return [row.context, row.question], list(row.answers)
    if isinstance(row, TextPair):
        return [row.source], list(row.targets)
    if isinstance(row, LabelledText):
        return [row.text, row.second or ""], [row.label]
    if isinstance(row, Match):
        return [row.query], [row.positive, *row.negatives]
    raise TypeError(type(row))
