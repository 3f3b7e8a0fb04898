"""The rows that a task learns from: of a folder that `prepare` wrote, or of a file of rows. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lexmill.data.documents import read_documents
from lexmill.data.forms import group_id, read_rows
from lexmill.data.labelled import Conversation, Row
from lexmill.data.splitting import assign_split
from lexmill.errors import DataError, FileError

TRAIN, VALIDATION = "train", "validation"
RowKind = TypeVar("RowKind", bound=Row)


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Where rows come from, and which of them are held out.

    Attributes:
        path: a folder with `train.parquet` and `validation.parquet`, or a file of rows.
        held_out: another file, all of it validation; then all of `path` is for training.
        fraction: of a file's rows that are validation, where there is no `held_out`; which ones
            their content decides, whatever their order.
    """

    path: Path
    held_out: Path | None = None
    fraction: float = 0.05
    seed: int = 0

    def rows(self, split: str, kind: type[RowKind]) -> Iterator[RowKind]:
        """The rows of a split, "train" or "validation", in their order, read anew each time.

        Raises:
            FileError: there is nothing at `path`.
            DataError: a row that cannot be used, or is of another kind; names file and row.
        """
        for row in self._rows(split):
            if not isinstance(row, kind):
                raise DataError(f"{row.origin}: this row is no {kind.__name__}.")
            yield row

    def texts(self, split: str) -> Iterator[str]:
        """Plain texts of a split of a prepared folder; a file of rows has none."""
        if self.path.is_dir():
            for document in read_documents(self.path / f"{split}.parquet"):
                if document.kind == "text" and document.text:
                    yield document.text

    def _rows(self, split: str) -> Iterator[Row]:
        if not self.path.exists():
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
            yield from read_rows(self.held_out if split == VALIDATION else self.path)
        else:
            for row in read_rows(self.path):
                if assign_split(group_id(row), self.seed, self.fraction) == split:
                    yield row
