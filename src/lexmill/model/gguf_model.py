"""A model in a GGUF file: its shape, its tokenizer and its weights, read from the file where it lies."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lexmill.errors import FormatError, ModelError
from lexmill.formats.gguf import GGUFFile
from lexmill.formats.safetensors import from_bfloat16
from lexmill.model.config import ModelConfig
from lexmill.model.directory import convert
from lexmill.model.gguf_config import config_from_gguf, pooling_of
from lexmill.model.gguf_rope import ROPE_FREQS
from lexmill.model.gguf_shapes import read_weight, weight_from_gguf
from lexmill.model.names import WeightName, weight_names, weight_shapes
from lexmill.tokenizer.gguf_reading import import_tokenizer
from lexmill.tokenizer.gguf_vocabulary import read_vocabulary
from lexmill.tokenizer.kept import kept_tokenizer
from lexmill.tokenizer.tokenizer import Tokenizer

ASKED = "lexmill.asked"  # a key of lexmill's own: how the model was asked in training for its tasks
_HINT = "The file is damaged or incomplete; make or copy it again."


class GGUFModel:
    """A model in an opened file, checked; weights stay on disk until asked for.

    Attributes:
        file: must stay open for as long as weights are read.
        config: the model's shape.
        weights: by lexmill's names.

    Raises:
        ModelError: no model, or one that lexmill does not have; says what is different.
        FormatError: the file is damaged.
    """

    def __init__(self, file: GGUFFile) -> None:
        kind = file.metadata.get("general.type")
        if kind is not None and not (isinstance(kind, str) and kind == "model"):
            raise ModelError(
                f"{file.path} holds '{str(kind)[:60]}', not a model.",
                "Adapters are imported with --base MODEL; projectors and importance matrices cannot be.",
            )
        self.file = file
        self._vocabulary = read_vocabulary(file)
        self.config: ModelConfig = config_from_gguf(file, self._vocabulary.rows)
        self.weights = GGUFWeights(file, self.config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """As tokenizer.json has it: the same ids as in llama.cpp."""
        return self.make_tokenizer()

    @functools.cached_property
    def kept_tokenizer(self) -> Tokenizer:
        """The same, from a file beside this one that keeps it."""
        return kept_tokenizer(self.file.path, self.make_tokenizer)

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer of the file's vocabulary, made anew."""
        tokenizer = import_tokenizer(self._vocabulary)
        tokenizer.settings["model_max_length"] = self.config.context
        return tokenizer

    @property
    def pooling(self) -> str:
        """How an encoder's tokens become one vector; "mean" for every other model."""
        return pooling_of(self.file) if self.config.shape == "encoder" else "mean"

    @property
    def lineage(self) -> dict[str, Any]:
        """What the file says of how the model was made and is asked."""
        return asked_in(self.file)


def asked_in(file: GGUFFile) -> dict[str, Any]:
    """How a model was asked in training for its tasks, as a file says it; empty where it says nothing."""
    value = file.metadata.get(ASKED)
    try:
        entries = json.loads(value) if isinstance(value, str) else []
    except (ValueError, RecursionError):
        entries = []
    return {"history": entries} if isinstance(entries, list) and entries else {}


class GGUFWeights(Mapping[str, np.ndarray]):
    """The weights of a GGUF file by lexmill's names, decoded to float32 when they are asked for.

    Attributes:
        read: is told how many numbers were decoded each time.

    Raises:
        FormatError: a weight is missing, has another shape, or is of a type that cannot be read.
        ModelError: the file has weights for which this shape has no place.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.file, self.config = file, config
        self.read: Callable[[int], object] = lambda size: None
        self._names = {name.own: name for name in weight_names(config)}
        shapes = weight_shapes(config)
        for own, name in self._names.items():
            info = file.tensors.get(name.gguf)
            if info is None:
                raise FormatError(f"{file.path}: the tensor '{name.gguf}' is missing.", _HINT)
            expected = name.whole_shape(shapes[own])
            if info.shape != expected:
                raise FormatError(
                    f"{file.path}: the tensor '{name.gguf}' has the shape {info.shape} instead of {expected}.",
                    _HINT,
                )
        # read with the shape; computed anew by every writer
        unused = set(file.tensors) - {name.gguf for name in self._names.values()} - {ROPE_FREQS}
        if unused:
            raise ModelError(
                f"{file.path}: the tensor '{min(unused)}' has no place in a {config.family} model here.",
                "It may have heads, biases or layers that lexmill does not have.",
            )

    def __getitem__(self, own: str) -> np.ndarray:
        weight = weight_from_gguf(self._stored(self._names[own]), self.config, self._names[own])
        self.read(weight.size)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _stored(self, name: WeightName) -> np.ndarray:
        values = read_weight(self.file, name)
        if not np.isfinite(values).all():
            raise FormatError(
                f"{self.file.path}: the tensor '{name.gguf}' holds something that is no number.", _HINT
            )
        return values

    def exact_dtypes(self) -> dict[str, str]:
        """How to store each weight so that nothing is lost: in one type for all if there is one below F32."""
        for dtype in ("BF16", "F16"):
            if all(self._fits(name, dtype) for name in self._names.values()):
                return dict.fromkeys(self._names, dtype)
        kinds = {own: self.file.tensors[name.gguf].type.name for own, name in self._names.items()}
        return {own: kind if kind in ("F16", "BF16") else "F32" for own, kind in kinds.items()}

    def _fits(self, name: WeightName, dtype: str) -> bool:
        kind = self.file.tensors[name.gguf].type.name
        if kind == dtype:
            return True
        values = self._stored(name)
        stored = convert(values, dtype)
        back = from_bfloat16(stored) if dtype == "BF16" else stored.astype(np.float32)
        return np.array_equal(back.view(np.uint32), values.view(np.uint32))
