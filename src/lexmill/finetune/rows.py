"""The rows that a task learns from: of a folder that `prepare` wrote, or of a file of rows. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lexmill.data.documents import document_id, read_documents
from lexmill.data.forms import RowFile, group_id, read_rows
from lexmill.data.labelled import KINDS, Conversation, Row, RowSettings
from lexmill.data.readers import find_inputs, read_raw
from lexmill.data.splitting import assign_split
from lexmill.data.tables import is_pair
from lexmill.errors import DataError, FileError

TRAIN, VALIDATION = "train", "validation"
_PIECE = 2000  # characters
_TEXT_HELD_OUT = 0.05  # of plain text, at least: else nothing could be measured
RowKind = TypeVar("RowKind", bound=Row)


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Where rows come from, and which of them are held out.

    Attributes:
        path: a folder with `train.parquet` and `validation.parquet`, or a file of rows.
        held_out: another file, all of it validation; then all of `path` is for training.
        fraction: of a file's rows that are validation, where there is no `held_out`; which ones
            their content decides, whatever their order.
        settings: how to read the rows of files.
        text: a file or folder of plain text.
    """

    path: Path
    held_out: Path | None = None
    fraction: float = 0.05
    seed: int = 0
    settings: RowSettings = field(default_factory=RowSettings)
    text: Path | None = None

    def rows(self, split: str, kind: type[RowKind]) -> Iterator[RowKind]:
        """The rows of a split, "train" or "validation", in their order, read anew each time.

        Raises:
            FileError: there is nothing at `path`.
            DataError: a row that cannot be used, or is of another kind; names file and row.
        """
        for row in self._rows(split, kind):
            if not isinstance(row, kind):
                raise DataError(
                    f"{row.origin}: a prepared folder holds no {KINDS[kind]}.", "Give a file of rows."
                )
            yield row

    @property
    def form(self) -> str:
        """The form of the rows, recognised by the first ones; "" of a prepared folder.

        Raises:
            FileError, DataError: the file cannot be read, or its form is not known.
        """
        return "" if self.path.is_dir() else RowFile(self.path, self.settings).recognise().name

    def texts(self, split: str) -> Iterator[str]:
        """Plain texts of a split: of `text`, else of a prepared folder; a file of rows has none.

        Files are parted into pieces of some paragraphs, and their content decides where each belongs.

        Raises:
            FileError, DataError: a file cannot be read, or holds no text.
        """
        if self.text is not None:
            for path in find_inputs([self.text.name], self.text.parent):
                for raw in read_raw(path):
                    for piece in _pieces(raw.text or ""):
                        key = document_id(piece, None)
                        if assign_split(key, self.seed, max(self.fraction, _TEXT_HELD_OUT)) == split:
                            yield piece
        elif self.path.is_dir():
            for document in read_documents(self.path / f"{split}.parquet"):
                if document.kind == "text" and document.text:
                    yield document.text

    def _rows(self, split: str, kind: type[Row]) -> Iterator[Row]:
        if not self.path.exists() and not is_pair(self.path):
            raise FileError(
                f"{self.path}: there are no such data.",
                "Give a file of rows, or the folder that 'lexmill prepare' wrote.",
            )
        if self.path.is_dir():
            shard = self.path / f"{split}.parquet"
            for document in read_documents(shard):
                if document.messages is not None:
                    yield Conversation(origin=f"{shard}, {document.id}", messages=tuple(document.messages))
        elif self.held_out is not None:
            yield from read_rows(self.held_out if split == VALIDATION else self.path, self.settings, kind)
        else:
            for row in read_rows(self.path, self.settings, kind):
                if assign_split(group_id(row), self.seed, self.fraction) == split:
                    yield row


def _pieces(text: str) -> Iterator[str]:
    """Whole paragraphs, together at least so many characters."""
    piece: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph)
        if size >= _PIECE:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if any(paragraph.strip() for paragraph in piece):
        yield "\n\n".join(piece)
