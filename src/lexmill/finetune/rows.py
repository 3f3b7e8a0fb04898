"""The rows that a task learns from: of a folder that `prepare` wrote, or of a file of rows. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lexmill.data.documents import Document, document_id, read_documents
from lexmill.data.readers import read_raw
from lexmill.data.splitting import assign_split
from lexmill.errors import FileError

TRAIN, VALIDATION = "train", "validation"


def read_split(
    data: Path, split: str, fraction: float, seed: int, held_out: Path | None = None
) -> Iterator[Document]:
    """The documents of a split, in their order.

    Args:
        data: a folder with `train.parquet` and `validation.parquet`, or a file of rows (JSONL, CSV, Parquet),
            each with "text" or "messages".
        split: "train" or "validation".
        fraction: of a file's rows that are validation; which ones their content decides, whatever their order.
        held_out: another file, all of it validation; then all of `data` is for training.

    Raises:
        FileError: there is nothing at `data`.
        DataError: a row that cannot be used; names file and row.
    """
    if not data.exists():
        raise FileError(
            f"{data}: there are no such data.",
            "Give a file of rows, or the folder that 'lexmill prepare' wrote.",
        )
    if data.is_dir():
        yield from read_documents(data / f"{split}.parquet")
    elif held_out is not None:
        yield from _rows(held_out if split == VALIDATION else data)
    else:
        for document in _rows(data):
            if assign_split(document.id, seed, fraction) == split:
                yield document


def _rows(path: Path) -> Iterator[Document]:
    for raw in read_raw(path):
        yield Document(
            id=document_id(raw.text, raw.messages),
            text=raw.text if raw.messages is None else None,
            messages=raw.messages,
            kind="text" if raw.messages is None else "chat",
            source=f"{path.name}#{raw.row}" if raw.row else path.name,
            language=raw.language,
            license=raw.license,
            meta=raw.meta,
        )
