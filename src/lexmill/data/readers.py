"""Raw files to raw documents, by suffix; every row that cannot be used is named with file, row and reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lexmill.config import suggest
from lexmill.data.decoding import raw_suffix, read_bytes, read_text
from lexmill.data.folders import find_inputs
from lexmill.data.markup import html_to_text, markdown_to_text
from lexmill.data.tables import read_table
from lexmill.errors import DataError
from lexmill.messages import check_messages, kind_of

__all__ = ["RawDocument", "find_inputs", "read_raw"]

ROW_NEEDS = 'Each row needs "text" or "messages".'


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """What one raw file, or one row of it, holds: as it was found, neither cleaned nor split.

    `row` is its 1-based row (in JSONL the line, in CSV the record under the header), or None when it is
    a whole file.
    """

    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    row: int | None = None
    language: str = ""
    license: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)


def read_raw(
    path: Path | str, *, license: str = "", language: str = "", column: str = "text"
) -> Iterator[RawDocument]:
    """Read one raw file.

    Args:
        path: a `.txt`, `.md`, `.html`/`.htm` (each one document), `.jsonl`/`.ndjson`, `.csv`, `.tsv` or
            `.parquet` file (a document a row, streamed). Files of rows may be compressed: `.csv.xz`, `.jsonl.gz`.
        license: for rows that do not say it themselves.
        language: likewise.
        column: the field of a row that holds the text.

    Raises:
        FileError: it cannot be opened.
        DataError: unknown suffix, empty, binary, not UTF-8, or a row that is not usable; says which.
        FormatError: a damaged Parquet file.
    """
    path = Path(path)
    rows = partial(_read_rows, column=column)
    readers: dict[str, Callable[[Path], Iterator[RawDocument]]] = {
        ".txt": _read_plain,
        ".md": _read_markdown,
        ".html": _read_html,
        ".htm": _read_html,
        ".jsonl": rows,
        ".ndjson": rows,
        ".csv": rows,
        ".tsv": rows,
        ".parquet": rows,
    }
    reader = readers.get(raw_suffix(path))
    if reader is None:
        raise DataError(
            f"{path}: files with the suffix '{path.suffix}' cannot be read.",
            f"Supported are {', '.join(readers)}; rename or convert the file.",
        )
    empty = True
    for raw in reader(path):
        empty = False
        yield RawDocument(
            text=raw.text,
            messages=raw.messages,
            row=raw.row,
            language=raw.language or language,
            license=raw.license or license,
            meta=raw.meta,
        )
    if empty:
        raise DataError(f"{path}: this file holds no rows.", "Remove it, or put rows into it. " + ROW_NEEDS)


def _row_document(values: Mapping[str, Any], where: str, row: int) -> RawDocument:
    """Check the fields of one row; what is neither content nor a known field goes to `meta` as a string."""
    text, messages = values.get("text"), values.get("messages")
    if text is None and messages is None:
        absent = "is missing" if "text" not in values else "is null"
        raise DataError(f'{where}: field "text" {absent}.', ROW_NEEDS)
    if text is not None and not isinstance(text, str):
        raise DataError(f'{where}: field "text" is {kind_of(text)}, not a string.', ROW_NEEDS)
    extra = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in values.items()
        if key not in ("text", "messages", "language", "license", "meta") and value is not None
    }
    if values.get("meta"):  # an object in JSON, pairs in Parquet
        extra |= {str(key): str(value) for key, value in _pairs(values["meta"], where)}
    return RawDocument(
        text=text,
        messages=None if messages is None else _conversation(messages, where),
        row=row,
        language=str(values.get("language") or ""),
        license=str(values.get("license") or ""),
        meta=extra,
    )


def _conversation(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    """The role and content of each message; further keys are left out."""
    checked = check_messages(messages, where)
    return tuple({"role": message["role"], "content": message["content"]} for message in checked)


def _pairs(meta: Any, where: str) -> list[tuple[Any, Any]]:
    try:
        return list(dict(meta).items())
    except (TypeError, ValueError):
        raise DataError(
            f'{where}: field "meta" is {kind_of(meta)}, not an object.', "Leave it out or mend it."
        ) from None


def _read_plain(path: Path) -> Iterator[RawDocument]:
    yield RawDocument(text=read_text(path))


def _read_markdown(path: Path) -> Iterator[RawDocument]:
    text = markdown_to_text(read_text(path))
    if not text.strip():
        raise DataError(f"{path}: this Markdown file holds no text.", "Remove it, or put text into it.")
    yield RawDocument(text=text)


def _read_html(path: Path) -> Iterator[RawDocument]:
    text, title = html_to_text(read_bytes(path))
    if not text.strip():
        raise DataError(
            f"{path}: this HTML page shows no text.",
            "It may be filled by a script in the browser; leave it out.",
        )
    yield RawDocument(text=text, meta={"title": title} if title else {})


def _read_rows(path: Path, column: str) -> Iterator[RawDocument]:
    def check(header: list[str], where: str) -> None:
        if column not in header and "messages" not in header:
            raise _no_column(where, header, column)

    text_cells = raw_suffix(path) in (".csv", ".tsv")
    for raw in read_table(path, header=check):
        values = _named_text(raw.values, column)
        if text_cells:
            values = _unpacked(values, raw.where)
        yield _row_document(values, raw.where, raw.row)


def _no_column(where: str, header: Collection[str], column: str) -> DataError:
    columns = ", ".join(f'"{name}"' for name in header) or "none"
    near = suggest(column, header)
    return DataError(
        f'{where}: there is no column "{column}"; the columns are {columns}.',
        f'{near + " " if near.startswith("Did") else ""}Say with column = "NAME" which one holds the text, '
        "or rename it.",
    )


def _named_text(values: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """The row with its text under the name "text"."""
    if column == "text" or column not in values:
        return values
    return {**{key: value for key, value in values.items() if key != column}, "text": values[column]}


def _unpacked(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The row with the messages that a CSV cell holds as JSON."""
    cell = values.get("messages")
    if cell is None:
        return values
    try:
        return {**values, "messages": json.loads(cell) if cell.strip() else None}
    except ValueError as error:
        raise DataError(f'{where}: field "messages" is not JSON ({error}).', ROW_NEEDS) from error
