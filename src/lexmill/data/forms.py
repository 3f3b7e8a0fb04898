"""Files of labelled rows to `Row`s: the forms that people have, recognised by their fields."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lexmill.data.documents import document_id
from lexmill.data.labelled import Conversation, Question, Row
from lexmill.data.readers import read_raw
from lexmill.errors import DataError


def read_rows(path: Path, form: str | None = None) -> Iterator[Row]:
    """The labelled rows of a file, in their order.

    Args:
        path: JSONL, JSON, CSV, TSV or Parquet, which may be compressed.
        form: what the rows look like; recognised by the first one when not given.

    Raises:
        FileError, DataError: it cannot be read, or a row cannot be used; names file and row.
    """
    for raw in read_raw(path):
        if raw.messages is None:
            raise DataError(f'{path}, row {raw.row}: there are no "messages".')
        yield Conversation(origin=f"{path}, row {raw.row:,}", messages=raw.messages)


def group_id(row: Row) -> str:
    """16 hexadecimal digits; rows that have the same must not be parted by a split. The same on every machine.

    That is a row's content but its origin; of questions the context, so that none is known from training.
    """
    if isinstance(row, Conversation):
        return document_id(None, row.messages)
    if isinstance(row, Question):
        return document_id(row.context, None)
    content = {key: value for key, value in dataclasses.asdict(row).items() if key != "origin"}
    text = json.dumps([type(row).__name__, content], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
