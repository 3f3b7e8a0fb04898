"""Where an engine's weights come from: the bytes as files hold them, by lexmill's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lexmill.errors import FormatError
from lexmill.formats.blocks import BLOCK_TYPES, BlockType
from lexmill.formats.gguf import GGUFFile
from lexmill.model.config import ModelConfig
from lexmill.model.directory import DTYPE_NAMES, ModelDirectory
from lexmill.model.gguf_shapes import read_weight, unpermute_rope, weight_from_gguf
from lexmill.model.names import WeightName, weight_names, weight_shapes


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as it is stored.

    Attributes:
        type: how.
        data: the bytes, flat uint8, rows behind each other.
        shape: as torch lays it out.
        order: int32 (rows,): which stored row each row is; None where they stand in order.
    """

    type: BlockType
    data: np.ndarray
    shape: tuple[int, ...]
    order: np.ndarray | None = None


class Source(Protocol):
    """A model's weights on disk.

    Attributes:
        config: its shape.
        files: what they are read from; when one changes, what was made from them is old.
    """

    config: ModelConfig

    @property
    def files(self) -> list[Path]: ...

    @property
    def packed(self) -> Path:
        """Where the engine keeps its own form of the weights."""
        ...

    def stored(self, own: str) -> Stored:
        """A weight as it is stored, by lexmill's name."""
        ...

    def float32(self, own: str) -> np.ndarray:
        """A weight as numbers."""
        ...


class DirectorySource:
    """A model directory."""

    def __init__(self, directory: ModelDirectory) -> None:
        self.directory, self.config = directory, directory.config

    @property
    def files(self) -> list[Path]:
        return sorted(self.directory.path.glob("*.safetensors"))

    @property
    def packed(self) -> Path:
        return self.directory.path / "model.packed"

    def stored(self, own: str) -> Stored:
        dtype, array = self.directory.weight_dtype(own), self.directory.stored(own)
        if dtype not in DTYPE_NAMES:  # float64, say
            dtype, array = "F32", self.directory.weight(own)
        return Stored(BLOCK_TYPES[dtype], _bytes(array), array.shape)

    def float32(self, own: str) -> np.ndarray:
        return self.directory.weight(own)


class GGUFSource:
    """A GGUF file whose shape has been read and checked."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.file, self.config = file, config
        self._names: Mapping[str, WeightName] = {name.own: name for name in weight_names(config)}
        self._shapes = weight_shapes(config)

    @property
    def files(self) -> list[Path]:
        return [self.file.path]

    @property
    def packed(self) -> Path:
        return self.file.path.with_name(self.file.path.name + ".packed")

    def stored(self, own: str) -> Stored:
        name, shape = self._names[own], self._shapes[own]
        found = self.file.tensors[name.gguf].shape
        if found != name.whole_shape(shape):
            raise FormatError(
                f"{self.file.path}: the tensor '{name.gguf}' has the shape {found} instead of {name.whole_shape(shape)}.",
                "The file is damaged or incomplete; make or copy it again.",
            )
        kind, data = self.file.tensors[name.gguf].type, self.file.raw(name.gguf)
        index, size = name.part[0], kind.byte_size(shape)
        return Stored(kind, data[index * size : (index + 1) * size], shape, self._order(name, shape))

    def float32(self, own: str) -> np.ndarray:
        name = self._names[own]
        return weight_from_gguf(read_weight(self.file, name), self.config, name)

    def _order(self, name: WeightName, shape: tuple[int, ...]) -> np.ndarray | None:
        """GGUF's llama turns rows 2i and 2i + 1 of a head together, we i and i + D/2."""
        if not name.rope or self.config.family != "llama":
            return None
        heads = self.config.heads if name.rope == "q" else self.config.kv_heads
        return np.ascontiguousarray(unpermute_rope(np.arange(shape[0], dtype=np.int32), heads))


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
