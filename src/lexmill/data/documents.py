"""Documents: the rows that every later stage reads, and the Parquet shards that hold them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lexmill.errors import DataError, FileError, FormatError
from lexmill.files import atomic_write, explain_os_errors

KINDS = ("text", "chat")
ROW_GROUP = 1000
REQUIRED_COLUMNS = ("id", "text", "messages", "kind")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document: a text, or a conversation.

    Args:
        id: `document_id` of its content.
        text: the text, or None for a conversation.
        messages: the conversation as `{"role", "content"}` mappings, or None for a text.
        kind: "text" or "chat".
        source: the raw file and the place in it, such as "austen/Emma.txt#12".
        language: a BCP 47 tag such as "en"; empty when unknown.
        license: what the source's owner says; empty when unknown.
        meta: whatever else the raw row held, as strings.
    """

    id: str
    text: str | None
    messages: Sequence[Mapping[str, str]] | None
    kind: str
    source: str = ""
    language: str = ""
    license: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)


def content_hash(text: str | None, messages: Sequence[Mapping[str, str]] | None) -> str:
    """The SHA-256 of a document's content, 64 hexadecimal digits; the same on every machine."""
    if messages is not None:
        pairs = [[message["role"], message["content"]] for message in messages]
        content = "chat\n" + json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))
    else:
        content = "text\n" + (text or "")
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def document_id(text: str | None, messages: Sequence[Mapping[str, str]] | None) -> str:
    """The first 16 hexadecimal digits of `content_hash`. Give it normalised content."""
    return content_hash(text, messages)[:16]


def document_schema() -> Any:
    """The Arrow schema of a document shard."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("text", pa.string()),
            ("messages", pa.list_(message)),
            ("kind", pa.string()),
            ("source", pa.string()),
            ("language", pa.string()),
            ("license", pa.string()),
            ("meta", pa.map_(pa.string(), pa.string())),
        ]
    )


def write_documents(path: Path | str, documents: Iterable[Document]) -> int:
    """Write a Parquet shard (zstd, row groups of 1,000), atomically and the same bytes for the same documents.

    Returns:
        How many documents were written.

    Raises:
        FileError: no space, no permission, or something in the way.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = document_schema()
    written = 0
    remaining = iter(documents)
    with atomic_write(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while rows := [_row(document) for document in itertools.islice(remaining, ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=ROW_GROUP)
            written += len(rows)
    return written


def _row(document: Document) -> dict[str, Any]:
    messages = document.messages
    return {
        "id": document.id,
        "text": document.text,
        "messages": None if messages is None else [dict(message) for message in messages],
        "kind": document.kind,
        "source": document.source,
        "language": document.language,
        "license": document.license,
        "meta": sorted(document.meta.items()),
    }


def read_documents(path: Path | str) -> Iterator[Document]:
    """Read the documents of a Parquet shard, or of all shards of a folder in the order of their names.

    Columns that this version does not know (parts of other kinds) are ignored.

    Raises:
        FileError: there is no such path.
        DataError: the folder holds no shard.
        FormatError: a shard is damaged, or lacks a column that documents have.
    """
    path = Path(path)
    if not path.is_dir():
        yield from _read_shard(path)
        return
    shards = sorted(path.glob("*.parquet"))
    if not shards:
        raise DataError(
            f"{path}: this folder holds no documents (*.parquet).",
            "Give the folder that `lexmill prepare` wrote.",
        )
    for shard in shards:
        yield from _read_shard(shard)


def read_texts(path: Path | str) -> Iterator[Document]:
    """The documents of kind "text" that are not empty, in their order: what pretraining learns from."""
    return (document for document in read_documents(path) if document.kind == "text" and document.text)


def find_texts(path: Path | str, numbers: Collection[int]) -> dict[int, Document]:
    """Those of `read_texts` with these numbers, counted from 0; reads no further than the last of them."""
    last = max(numbers, default=-1)
    texts = itertools.islice(enumerate(read_texts(path)), last + 1)
    return {number: document for number, document in texts if number in numbers}


def _read_shard(path: Path) -> Iterator[Document]:
    known = document_schema().names
    for batch in read_parquet_batches(path, required=REQUIRED_COLUMNS, wanted=known):
        for row in batch:
            yield _document(row, path)


def _document(row: dict[str, Any], path: Path) -> Document:
    kind, messages = row["kind"], row["messages"]
    where = f"{path}, document {row['id']}"
    if kind not in KINDS:
        raise FormatError(f'{where}: its kind is {kind!r}, not "text" or "chat".')
    content = messages if kind == "chat" else row["text"]
    if content is None:
        column = "messages" if kind == "chat" else "text"
        raise FormatError(
            f'{where}: its kind is "{kind}" but its column "{column}" is empty.', "Prepare the data again."
        )
    return Document(
        id=row["id"] or "",
        text=row["text"],
        messages=None if messages is None else tuple(messages),
        kind=kind,
        source=row.get("source") or "",
        language=row.get("language") or "",
        license=row.get("license") or "",
        meta=dict(row.get("meta") or ()),
    )


def read_parquet_batches(
    path: Path, *, required: Sequence[str] = (), wanted: Sequence[str] | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Read a Parquet file piece by piece as lists of rows.

    Args:
        path: the file.
        required: columns that must be there.
        wanted: columns to read when they are there; None reads all that hold no bytes.

    Raises:
        FileError: it cannot be opened.
        FormatError: it is damaged, no Parquet file, or lacks a required column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileError(f"{path}: there is no such Parquet file.", "Check the spelling of the path.")
    try:
        with explain_os_errors(path, "read"), open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            missing = [name for name in required if name not in schema.names]
            if missing:
                raise FormatError(
                    f"{path}: this Parquet file has no column {', '.join(map(repr, missing))}; it has "
                    f"{', '.join(map(repr, schema.names)) or 'none'}.",
                    "Raw Parquet files become documents with `lexmill prepare`.",
                )
            columns = [
                name
                for name, kind in zip(schema.names, schema.types, strict=True)
                if (name in wanted if wanted is not None else not pa.types.is_binary(kind))
            ]
            for batch in parquet.iter_batches(batch_size=ROW_GROUP, columns=columns):
                yield batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(
            f"{path}: this Parquet file is damaged or no Parquet file ({detail}).",
            "Copy it again from its source, or make it again.",
        ) from error
