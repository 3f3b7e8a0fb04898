"""Rows that are longer than a training row: refused with their names, cut, or left out, as the user says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from lexmill.data.labelled import Row
from lexmill.errors import DataError

_SHOWN = 5
RowKind = TypeVar("RowKind", bound=Row)
Made = TypeVar("Made")


class Lengths:
    """What happens to long rows, and to how many it did.

    Attributes:
        longer: rows that were longer than `length`.
    """

    def __init__(self, choice: str, length: int) -> None:
        self._choice, self._length = choice, length
        self._named: list[str] = []
        self.longer = 0

    def kept(self, rows: Iterable[tuple[RowKind, int, Made]]) -> Iterator[tuple[RowKind, Made]]:
        """The rows to learn from, each given with its tokens.

        Raises:
            DataError: rows that are too long, if that is an error; when all have been seen.
        """
        for row, size, made in rows:
            if size > self._length:
                self.longer += 1
                if len(self._named) < _SHOWN:
                    self._named.append(f"{row.origin} ({size:,} tokens)")
                if self._choice != "cut":
                    continue
            yield row, made
        if self.longer and self._choice == "error":
            more = f" and {self.longer - _SHOWN:,} more" if self.longer > _SHOWN else ""
            raise DataError(
                f"{self.longer:,} rows are longer than the {self._length:,} tokens of a training row: "
                f"{', '.join(self._named)}{more}.",
                'Set too_long = "cut" (drops the ends of their texts), too_long = "drop" (leaves them out), '
                "or a larger row_length.",
            )

    def told(self) -> str:
        """For a reader, as the end of a sentence."""
        what = "are left out" if self._choice == "drop" else f"are cut to {self._length:,} tokens"
        return f"; {self.longer:,} rows {what}" if self.longer else ""
