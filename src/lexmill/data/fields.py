"""The fields of one row, asked for by the names of its form; what is missing or of another type is an error with its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lexmill.data.labelled import RowSettings
from lexmill.errors import DataError
from lexmill.messages import kind_of


class Fields:
    """One row.

    Args:
        values: by the form's own names.
        names: what each of them is called in the file, for errors.
        where: "train.jsonl, row 3".
        settings: how to read.
        dropped: counts what is left out of rows, in words.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        names: Mapping[str, str],
        where: str,
        settings: RowSettings,
        dropped: Counter[str],
    ) -> None:
        self.where, self.settings, self.dropped = where, settings, dropped
        self._values, self._names = values, names

    def get(self, name: str) -> Any:
        """A value of any type; None where there is none."""
        return self._values.get(name)

    def called(self, name: str) -> str:
        """The name of a field in the file."""
        return self._names.get(name, name)

    def error(self, name: str, said: str, hint: str = "") -> DataError:
        """What is wrong with a field."""
        return DataError(f'{self.where}: field "{self.called(name)}" {said}.', hint)

    def text(self, name: str) -> str:
        """A string that is not blank."""
        value = self.get(name)
        if value is None:
            raise self.error(name, "is missing or null")
        if not isinstance(value, str):
            raise self.error(name, f"is {kind_of(value)}, not a string")
        if not value.strip():
            raise self.error(name, "is empty", "Fill it, or take the row out.")
        return value

    def text_or_none(self, name: str) -> str | None:
        """A string; None where it is missing, null or blank."""
        value = self.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        return self.text(name)

    def texts(self, name: str) -> tuple[str, ...]:
        """One string or a list of them, none blank; empty where there is none."""
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)):
            return (self.text(name),)
        for number, one in enumerate(value, 1):
            if not isinstance(one, str) or not one.strip():
                said = "is empty" if isinstance(one, str) else f"is {kind_of(one)}, not a string"
                raise self.error(name, f"has an entry, number {number:,}, that {said}")
        return tuple(value)

    def drop(self, what: str) -> None:
        """Note that something was left out."""
        self.dropped[what] += 1
