"""The settings of a GGUF file's architecture, read with their types; what is wrong is named with its key."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lexmill.errors import FormatError, ModelError
from lexmill.formats.gguf import GGUFFile

HINT = "Take the model's Hugging Face directory, or another model."


class Keys:
    """Reads the settings of one architecture and complains by their names."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.values, self.prefix, self.where = file.metadata, prefix, str(file.path)
        self.tensors = len(file.tensors)

    def find(self, name: str) -> Any:
        return self.values.get(f"{self.prefix}.{name}")

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.find(name)
        if isinstance(value, np.ndarray):  # one number a layer; all the same in the shapes known here
            distinct = set(value.tolist())
            if len(distinct) != 1:
                raise ModelError(f"{self.where}: '{self.prefix}.{name}' differs from layer to layer.", HINT)
            value = distinct.pop()
        value = default if value is None else value
        if value is None or isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise self.wrong(name, value)
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A number of layers: each has tensors, so a file with fewer of them lies."""
        layers = self.whole(name, default)
        if layers > self.tensors:
            raise self.wrong(name, layers)
        return layers

    def real(self, name: str, default: float | None = None) -> float:
        value = self.find(name)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.wrong(name, value)
        return tidy(float(value))

    def wrong(self, name: str, value: Any) -> FormatError:
        found = "is missing" if value is None else f"is {str(value)[:60]}"
        return FormatError(
            f"{self.where}: the setting '{self.prefix}.{name}' {found}.", "The file is damaged or incomplete."
        )


def tidy(value: float) -> float:
    """The shortest decimal that is the same float32: files say 1e-05 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))
