"""Files of labelled rows to `Row`s: the forms that people have, recognised by their columns."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lexmill.config import suggest
from lexmill.data.decoding import raw_suffix
from lexmill.data.fields import Fields
from lexmill.data.labelled import (
    KINDS,
    Conversation,
    LabelledText,
    Match,
    Preference,
    Question,
    Row,
    RowSettings,
    TextPair,
)
from lexmill.data.splitting import words_of
from lexmill.data.tables import RawRow, is_pair, read_table
from lexmill.data.talk_forms import (
    alpaca,
    chosen_conversation,
    completed_prompt,
    conversation,
    preference,
    prompt_pair,
    sharegpt,
)
from lexmill.data.text_forms import labelled_text, match, question, text_pair
from lexmill.errors import DataError

_LOOKED_AT = 20  # first rows by which a form is recognised
RowKind = TypeVar("RowKind", bound=Row)


@dataclass(frozen=True)
class Form:
    """What rows look like.

    Attributes:
        needed: columns that each row has, with other names that they may have.
        optional: columns that it may have, likewise.
        gives: the kinds of rows that it can become; the first is the one where none is asked for.
    """

    name: str
    needed: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]
    gives: Mapping[type[Row], Callable[[Fields], Row]]

    def names(self, values: Mapping[str, Any]) -> dict[str, str]:
        """What the form's columns are called in a row, as far as it has them."""
        found = {}
        for name, others in {**self.needed, **self.optional}.items():
            called = next((one for one in (name, *others) if values.get(one) is not None), None)
            if called is not None:
                found[name] = called
        return found

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether a row has what is needed."""
        return self.needed.keys() <= self.names(values).keys()


# A new form: here, with a function that makes a row of its fields; its name in `FormName`, its columns in `Columns`.
# The first one that fits is taken, so those with rarer columns stand above.
FORMS = (
    Form("messages", {"messages": ()}, {}, {Conversation: conversation}),
    Form(
        "chosen-rejected",
        {"chosen": (), "rejected": ()},
        {"prompt": ("question", "instruction"), "system": ()},
        {Preference: preference, Conversation: chosen_conversation},
    ),
    Form("sharegpt", {"conversations": ("conversation",)}, {"system": ()}, {Conversation: sharegpt}),
    Form(
        "squad",
        {"question": (), "context": (), "answers": ()},
        {"id": (), "is_impossible": ()},
        {Question: question},
    ),
    Form(
        "alpaca",
        {"instruction": (), "output": ("response",)},
        {"input": ("context",), "system": (), "history": ()},
        {Conversation: alpaca},
    ),
    Form(
        "prompt-completion",
        {"prompt": ("question",), "completion": ("response", "answer")},
        {"system": ()},
        {Conversation: completed_prompt, TextPair: prompt_pair},
    ),
    Form(
        "source-target",
        {
            "source": ("src", "document", "article", "dialogue", "text"),
            "target": ("targets", "tgt", "summary", "highlights"),
        },
        {},
        {TextPair: text_pair},
    ),
    Form(
        "query-positive",
        {"query": ("anchor", "question"), "positive": ("pos",)},
        {"negatives": ("negative", "neg")},
        {Match: match},
    ),
    Form(
        "text-label",
        {"text": ("sentence", "sentence1", "premise", "question1"), "label": ()},
        {"second": ("text2", "text_pair", "sentence2", "hypothesis", "question2")},
        {LabelledText: labelled_text},
    ),
)


class RowFile:
    """A file of labelled rows, read as often as `rows` is called.

    Attributes:
        form: what its rows look like, once the first ones were read.
        dropped: what was left out of rows, in words, and how often; of the newest reading.
        looks: how many rows look like which form; "" where they look like none.
    """

    def __init__(
        self, path: Path, settings: RowSettings | None = None, kind: type[Row] | None = None
    ) -> None:
        self.path, self.settings = path, settings or RowSettings()
        self.form: Form | None = None
        self.dropped: Counter[str] = Counter()
        self.looks: Counter[str] = Counter()
        self._kind = kind
        self._columns = {name: value for name, value in vars(self.settings.columns).items() if value}

    def recognise(self) -> Form:
        """The form of the rows, by the first ones.

        Raises:
            FileError, DataError: the file cannot be read, holds no rows, or looks like none of the forms.
        """
        if self.form is None:
            next(self.rows(reject=lambda _: None), None)
        assert self.form is not None
        return self.form

    def rows(self, reject: Callable[[DataError], None] | None = None) -> Iterator[Row]:
        """The rows in their order.

        Args:
            reject: is given the error of each row that cannot be used, and reading goes on; raised when not given.

        Raises:
            FileError, DataError: the file cannot be read, looks like none of the forms, or a row cannot be used.
        """
        self.dropped.clear()
        self.looks.clear()
        refuse = reject or self._refuse
        # the first rows are looked at before any is made; errors wait for their turn among them
        head: list[RawRow | DataError] = []
        hold: Callable[[DataError], None] = head.append
        table = self._named(
            read_table(self.path, reject=lambda error: hold(error)), lambda error: hold(error)
        )
        if self.form is None:
            for raw in table:
                head.append(raw)
                if len(head) >= _LOOKED_AT:
                    break
            self.form = self._choose([raw for raw in head if isinstance(raw, RawRow)], head)
        hold = refuse
        make = self._maker(self.form)
        for one in itertools.chain(head, table):
            try:
                if isinstance(one, DataError):
                    raise one
                yield make(self._fields(one, self.form))
            except DataError as error:
                refuse(error)

    def _refuse(self, error: DataError) -> None:
        """What becomes of a row that cannot be used, by the settings."""
        if self.settings.bad_rows == "refuse":
            more = f'"lexmill data check {self.path}" lists all such rows; bad_rows = "skip" leaves them out.'
            raise DataError(error.message, f"{error.hint} {more}".lstrip()) from error
        self.dropped["rows that cannot be used"] += 1

    def _named(self, table: Iterator[RawRow], refuse: Callable[[DataError], None]) -> Iterator[RawRow]:
        """Rows whose columns have the names that the settings give them."""
        cells = not is_pair(self.path) and raw_suffix(self.path) in (".csv", ".tsv")
        columns = dict(self._columns)
        for raw in table:
            values = _unpacked(raw.values) if cells else raw.values
            both = values.get("translation")
            if isinstance(both, Mapping):
                if not columns.keys() & {"source", "target"} and len(both) == 2:
                    # every row in the order of the first
                    columns |= zip(("source", "target"), both)
                values = {**{key: one for key, one in values.items() if key != "translation"}, **both}
            missing = next((called for called in columns.values() if called not in values), None)
            if missing is None:
                theirs = {key: one for key, one in values.items() if key not in columns.values()}
                renamed = {name: values[called] for name, called in columns.items()}
                yield RawRow({**theirs, **renamed}, raw.row, raw.where)
                continue
            refuse(
                DataError(f'{raw.where}: there is no column "{missing}".', suggest(missing, map(str, values)))
            )

    def _choose(self, head: list[RawRow], all_read: Sequence[RawRow | DataError]) -> Form:
        """The form that the settings name, or the first one that fits a row; those that give the kind asked come first."""
        if not head:
            if all_read and isinstance(all_read[0], DataError):
                raise all_read[0]
            raise DataError(f"{self.path}: this file holds no rows.", "Put rows into it.")
        if self.settings.form is not None:
            return next(form for form in FORMS if form.name == self.settings.form)
        able = [form for form in FORMS if {*form.needed, *form.optional} >= self._columns.keys()]
        wanted = [form for form in able if self._kind in form.gives]
        for form in (*wanted, *able):
            if any(form.fits(raw.values) for raw in head):
                return form
        columns = ", ".join(f'"{name}"' for name in head[0].values) or "none"
        known = "; ".join(f"{form.name} ({', '.join(form.needed)})" for form in FORMS)
        raise DataError(
            f"{head[0].where}: its form is not known; its columns are {columns}.",
            f"Forms are {known}. Other names of columns can be given: --set columns.text=NAME",
        )

    def _maker(self, form: Form) -> Callable[[Fields], Row]:
        if self._kind is None:
            return next(iter(form.gives.values()))
        make = form.gives.get(self._kind)
        if make is None:
            able = ", ".join(f"'{other.name}'" for other in FORMS if self._kind in other.gives)
            given = " or ".join(KINDS[kind] for kind in form.gives)
            raise DataError(
                f"{self.path}: rows of the form '{form.name}' are {given}, but the task needs {KINDS[self._kind]}.",
                f"Forms for it: {able}.",
            )
        return make

    def _fields(self, raw: RawRow, form: Form) -> Fields:
        try:  # JSON can say "\\ud800", which is half a character
            json.dumps(raw.values, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                f"{raw.where}: it holds half a surrogate pair, which is no character.", "Take it out."
            ) from None
        names = form.names(raw.values)
        absent = next((name for name in form.needed if name not in names), None)
        other = None if absent is None else next((other for other in FORMS if other.fits(raw.values)), None)
        self.looks[form.name if absent is None else other.name if other else ""] += 1
        if absent is not None:
            if other is not None and self.settings.form is None:
                raise DataError(
                    f"{raw.where}: mixed forms: this row looks like '{other.name}', the first ones like '{form.name}'.",
                    "Put the rows of each form into a file of its own.",
                )
            said = "is empty or null" if absent in raw.values else "is missing"
            needs = ", ".join(f'"{name}"' for name in form.needed)
            raise DataError(
                f'{raw.where}: field "{self._columns.get(absent, absent)}" {said}.',
                f"Each row of the form '{form.name}' has {needs}.",
            )
        for column in raw.values.keys() - set(names.values()):
            self.dropped[f'column "{column}"'] += 1
        values = {name: raw.values[called] for name, called in names.items()}
        called = {name: self._columns.get(name, called) for name, called in names.items()}
        return Fields(values, called, raw.where, self.settings, self.dropped)


def _unpacked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a CSV row, where one holds JSON of more than a text as what it says."""
    found: dict[str, Any] = dict(values)
    for name, cell in values.items():
        if isinstance(cell, str) and cell[:1] in ("[", "{"):
            try:
                value = json.loads(cell)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) or (value and isinstance(value[0], (dict, list, str))):
                found[name] = value
        elif cell == "":
            found[name] = None
    return found


def read_rows(
    path: Path, settings: RowSettings | None = None, kind: type[RowKind] | None = None
) -> Iterator[Any]:
    """The labelled rows of a file, in their order.

    Args:
        path: JSONL, JSON, CSV, TSV or Parquet, which may be compressed; or two text files, "train.{en,de}".
        settings: what the rows look like and what their columns are called; recognised when not given.
        kind: what they shall become; what suits their form best when not given.

    Raises:
        FileError, DataError: it cannot be read, or a row cannot be used; names file and row.
    """
    return RowFile(path, settings, kind).rows()


def group_id(row: Row) -> str:
    """16 hexadecimal digits; rows that have the same must not be parted by a split. The same on every machine.

    That is what a row asks, in lower case without punctuation: of conversations and preferences the opening question,
    as in `prepare`; of questions the context, of pairs the source, of texts with a label the texts, of matches the query.
    """
    asked: list[str]
    if isinstance(row, (Conversation, Preference)):
        said = [message["content"] for message in row.messages if message["role"] == "user"]
        asked = said[:1] or [message["content"] for message in row.messages]
    elif isinstance(row, Question):
        asked = [row.context]
    elif isinstance(row, TextPair):
        asked = [row.source]
    elif isinstance(row, LabelledText):
        asked = [row.text, row.second or ""]
    elif isinstance(row, Match):
        asked = [row.query]
    else:
        raise TypeError(f"rows of the kind {type(row).__name__} cannot be split")
    text = json.dumps([type(row).__name__, *map(words_of, asked)], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
