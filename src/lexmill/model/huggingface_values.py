"""Values of a `config.json`, read with their types; what is wrong is named with its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexmill.errors import ModelError

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Values:
    """Reads typed values and complains by name."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(
                f"{self.where}: the key '{key}' is missing.", "The file may be cut off; copy it again."
            )
        number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        if not (isinstance(value, kind) or number) or (kind is int and isinstance(value, bool)):
            raise ModelError(f"{self.where}: '{key}' should be of type {kind.__name__}, but is {value!r}.")
        try:
            return kind(value)
        except OverflowError:
            raise ModelError(f"{self.where}: '{key}' is too large a number.") from None

    def activation(self, key: str, default: str) -> str:
        name = self.get(key, str, default)
        if name not in ACTIVATIONS:
            raise ModelError(f"{self.where}: the activation '{name}' is not supported yet.")
        return ACTIVATIONS[name]

    def rope(self) -> Mapping[str, Any]:
        """The table of rotary parameters; transformers 4 kept those of scaled positions in another."""
        tables = [self.values.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
        if not all(isinstance(table, Mapping) for table in tables):
            raise ModelError(f"{self.where}: 'rope_parameters' should be a table.")
        return {**tables[1], **tables[0]}

    def refuse(self, problems: Mapping[str, bool]) -> None:
        """A feature that would be ignored in silence is an error instead: the answers would differ."""
        for problem, present in problems.items():
            if present:
                raise ModelError(f"{self.where}: {problem} is not supported yet.")
