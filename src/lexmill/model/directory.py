"""Model directories: reading and writing what is exactly a Hugging Face directory. Free of torch."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.errors import FileError, ModelError
from lexmill.files import atomic_directory, read_json, require_file, require_space, write_json
from lexmill.formats.safetensors import Weights, open_weights, to_bfloat16
from lexmill.formats.safetensors_writing import SHARD_BYTES, TensorToWrite, write_shards
from lexmill.model.config import ModelConfig
from lexmill.model.names import WeightName, find_name, weight_names, weight_shapes
from lexmill.model.sentence_files import read_pooling, write_sentence_files
from lexmill.tokenizer.tokenizer import Tokenizer

LINEAGE_FILE = "lexmill.json"
DATA_CARD = "DATA.md"  # what it learned from, where that is known
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of safetensors, and of config.json
# A folder with any of these means to have a tokenizer; one without them still takes ids.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
)
_COMPLETE = "Is the folder a complete model directory? Make or copy it again."


class ModelDirectory:
    """A model on disk.

    Attributes:
        path: the folder.
        config: the model's shape.
        tokenizer: its tokenizer, special ids and chat template.
        lineage: what `lexmill.json` says of its making; empty for models made by others.
        begun: weights that are not on disk, by our names: those of a head that is still to learn.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        lineage: dict[str, Any],
        weights: Weights,
        begun: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.path, self.config, self.lineage = path, config, lineage
        self.begun = dict(begun or {})
        self._tokenizer, self._weights = tokenizer, weights
        self._names = {name.own: name for name in weight_names(config)}
        self._stored = _stored_names(path, config, weights, self.begun)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one: a model without it still takes ids."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer.

        Raises:
            FileError: the directory has none.
        """
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self.path)
        return self._tokenizer

    def weight(self, own_name: str) -> np.ndarray:
        """One weight as float32, by lexmill's name for it."""
        if own_name in self.begun:
            return self.begun[own_name]
        return self._names[own_name].rows(self._weights.float32(self._stored[own_name]))

    def stored(self, own_name: str) -> np.ndarray:
        """One weight as it is stored, a view of the file; bfloat16 as its bits."""
        if own_name in self.begun:
            return self.begun[own_name]
        return self._names[own_name].rows(self._weights.array(self._stored[own_name]))

    def weight_dtype(self, own_name: str) -> str:
        """How it is stored: "F32", "BF16" or "F16"."""
        return "F32" if own_name in self.begun else self._weights.dtype(self._stored[own_name])

    def stored_tensors(
        self, dtype: str = "", changed: Mapping[str, np.ndarray] | None = None
    ) -> list[TensorToWrite]:
        """Every tensor of the files, those that the model does not use among them, for writing anew.

        Args:
            dtype: "F32", "F16" or "BF16" to convert what is a real number; "" leaves all as it is.
            changed: weights by lexmill's names, float32, that take the place of those in the files; each is
                asked for when its turn comes.
        """
        owns: dict[str, list[str]] = {}
        for own, stored in self._stored.items():
            if changed is not None and own in changed:
                owns.setdefault(stored, []).append(own)

        def row(name: str) -> TensorToWrite:
            stored, shape = self._weights.dtype(name), self._weights.shape(name)
            if name in owns:
                assert changed is not None
                parts, kind = (
                    [functools.partial(changed.__getitem__, own) for own in owns[name]],
                    dtype or stored,
                )
                return TensorToWrite(
                    name, kind, shape, lambda: convert(np.concatenate([part() for part in parts]), kind)
                )
            if not dtype or stored not in DTYPE_NAMES or stored == dtype:
                return TensorToWrite(name, stored, shape, lambda: self._weights.array(name))
            return TensorToWrite(name, dtype, shape, lambda: convert(self._weights.float32(name), dtype))

        return [row(name) for name in self._weights.names()]

    @functools.cached_property
    def pooling(self) -> str:
        """How an encoder's tokens become one vector: as its sentence-transformers files say, or "mean"."""
        return read_pooling(self.path) or "mean"

    def weights(self) -> dict[str, np.ndarray]:
        """Every weight as float32, by lexmill's names."""
        return {own: self.weight(own) for own in self._names}

    def weights_on_demand(self) -> Mapping[str, np.ndarray]:
        """The same, each read when it is asked for and not kept."""
        return _StoredWeights(self, self._names)

    def holds(self, name: WeightName) -> bool:
        """Whether the files hold a weight, also one that the model as it is does not use."""
        return find_name(name, frozenset(self._weights.names())) is not None

    def with_config(self, config: ModelConfig, begun: Mapping[str, np.ndarray]) -> ModelDirectory:
        """The same files as another model, which has other heads.

        Args:
            begun: weights of it that the files do not hold.
        """
        return ModelDirectory(self.path, config, self._tokenizer, self.lineage, self._weights, begun)

    @classmethod
    def open(cls, path: Path | str) -> ModelDirectory:
        """Open a model directory and check that it is whole; weights stay on disk until asked for.

        Raises:
            FileError: the folder or one of its files is missing.
            FormatError: a file is damaged or cut off.
            ModelError: files that do not belong together, or a model that is not supported.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileError(f"{path}: there is no such model directory.", "Check the spelling of the path.")
        config_path = require_file(path / "config.json", "model configuration", _COMPLETE)
        values = read_json(config_path, "model configuration")
        if not isinstance(values, dict):
            raise ModelError(f"{config_path} should hold a JSON object.", _COMPLETE)
        weights = open_weights(path)
        config = ModelConfig.from_huggingface(values, str(config_path), _telling_names(weights))
        tensors = len(weights.names())
        if config.layers + config.decoder_layers > tensors:  # before a table of so many layers is made
            raise ModelError(
                f"{config_path} asks for {config.layers + config.decoder_layers:,} layers, but the weights are "
                f"only {tensors:,} tensors.",
                _COMPLETE,
            )
        tokenizer = Tokenizer.load(path) if has_tokenizer(path) else None
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise ModelError(
                f"{path}: the tokenizer has {tokenizer.vocab_size:,} tokens, but the model only {config.vocab_size:,}.",
                "tokenizer.json and config.json come from different models.",
            )
        lineage = read_json(path / LINEAGE_FILE, "lineage") if (path / LINEAGE_FILE).is_file() else {}
        return cls(path, config, tokenizer, lineage if isinstance(lineage, dict) else {}, weights)


class _StoredWeights(Mapping[str, np.ndarray]):
    """A directory's weights, none of them in memory before its turn."""

    def __init__(self, model: ModelDirectory, names: Collection[str]) -> None:
        self._model, self._names = model, names

    def __getitem__(self, own: str) -> np.ndarray:
        return self._model.weight(own)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def has_tokenizer(path: Path) -> bool:
    """Whether a folder holds a tokenizer of any kind."""
    return any((path / name).is_file() for name in _TOKENIZER_FILES)


def _telling_names(weights: Weights) -> frozenset[str]:
    """The names that tell which heads a model has; a projection that only repeats the embedding is none."""
    names = frozenset(weights.names())
    if {"lm_head.weight", "shared.weight"} <= names and np.array_equal(
        weights.array("lm_head.weight"), weights.array("shared.weight")
    ):
        return names - {"lm_head.weight"}
    return names


def _stored_names(
    path: Path, config: ModelConfig, weights: Weights, begun: Collection[str] = ()
) -> dict[str, str]:
    """What the files call each weight, by lexmill's names, after checking that all are there and fit.

    Raises:
        ModelError: a weight is missing or has another shape.
    """
    stored, shapes = {}, weight_shapes(config)
    present = frozenset(weights.names())
    for name in weight_names(config):
        if name.own in begun:
            continue
        found = find_name(name, present)
        if found is None:
            raise ModelError(f"{path}: the weight '{name.huggingface}' is missing.", _COMPLETE)
        expected = name.whole_shape(shapes[name.own])
        if weights.shape(found) != expected:
            raise ModelError(
                f"{path}: the weight '{found}' has the shape {weights.shape(found)}, "
                f"but config.json asks for {expected}.",
                "config.json and model.safetensors come from different models.",
            )
        stored[name.own] = found
    return stored


def write_model_directory(
    path: Path | str,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    lineage: Mapping[str, Any] | None = None,
    *,
    dtypes: Mapping[str, str] | None = None,
    pooling: str = "mean",
    shard_bytes: int = SHARD_BYTES,
) -> ModelDirectory:
    """Write a complete model directory, whole or not at all, and open it.

    Args:
        weights: every weight by lexmill's name, float32. Each is asked for once, when its turn comes,
            so the mapping may make them on demand.
        lineage: recipe, data and tokenizer hashes, steps, scores; goes to `lexmill.json`.
        dtypes: how to store each weight, by lexmill's name: "F32" (where nothing is said), "BF16" or
            "F16". Values that the type cannot hold are rounded.
        pooling: of an encoder, for sentence-transformers.
        shard_bytes: above this the weights are cut into several files with an index.

    Raises:
        FileError: no space or no permission.
        ModelError: the tokenizer does not fit the vocabulary.
    """
    path = Path(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens, the model only {config.vocab_size:,}."
        )
    rows = _as_stored(config, weights, dtypes or {})
    require_space(path.parent, int(1.1 * sum(row.nbytes for row in rows)), "The model")
    with atomic_directory(path) as folder:
        ids = tokenizer.ids
        dtype = DTYPE_NAMES[common_dtype(row.dtype for row in rows)]
        write_json(
            folder / "config.json",
            config.to_huggingface()
            | {
                "bos_token_id": ids.bos,
                "eos_token_id": list(ids.stop),
                "pad_token_id": ids.pad,
                # left out, ModernBERT's defaults would stand, which lie outside a small vocabulary
                **{
                    f"{name}_token_id": token
                    for name in ("cls", "sep")
                    if (token := getattr(ids, name)) is not None
                },
                "dtype": dtype,
                "torch_dtype": dtype,  # transformers 4 reads this name
            },
        )
        write_shards(folder, rows, shard_bytes)
        tokenizer.save(folder, context=config.context)
        if config.shape == "encoder_decoder":  # transformers will not generate without it
            values = read_json(folder / "generation_config.json", "generation settings")
            write_json(
                folder / "generation_config.json", values | {"decoder_start_token_id": config.decoder_start}
            )
        if config.shape == "encoder":
            write_sentence_files(folder, config, pooling)
        write_json(folder / LINEAGE_FILE, dict(lineage or {}))
    return ModelDirectory.open(path)


def common_dtype(dtypes: Iterable[str]) -> str:
    """The type in which a model of weights of these types loses nothing."""
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else "F32"


def convert(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as "F32", "F16" or "BF16" (its bits in uint16), rounded to the nearest."""
    if dtype == "BF16":
        return to_bfloat16(array)
    with np.errstate(over="ignore"):
        return array.astype("<f2" if dtype == "F16" else "<f4")


def _as_stored(
    config: ModelConfig, weights: Mapping[str, np.ndarray], dtypes: Mapping[str, str]
) -> list[TensorToWrite]:
    """Every weight by Hugging Face's name; what it holds as one matrix is laid together."""
    parts: dict[str, list[WeightName]] = {}
    for name in weight_names(config):
        parts.setdefault(name.huggingface, []).append(name)
    shapes = weight_shapes(config)

    def row(stored: str, names: list[WeightName]) -> TensorToWrite:
        owns = [name.own for name in names]
        dtype = common_dtype(dtypes.get(own, "F32") for own in owns)
        shape = (sum(shapes[own][0] for own in owns), *shapes[owns[0]][1:])

        def produce() -> np.ndarray:
            whole = weights[owns[0]] if len(owns) == 1 else np.concatenate([weights[own] for own in owns])
            return convert(np.asarray(whole, np.float32), dtype)

        return TensorToWrite(stored, dtype, shape, produce)

    rows = [row(stored, names) for stored, names in parts.items()]
    by_name = {one.name: one for one in rows}
    if config.family == "t5" and config.tied and not config.scale_output:
        # transformers 4 takes "no scaling" as "not tied" and then wants the projection; 5 ties all the same
        rows.append(by_name["shared.weight"]._replace(name="lm_head.weight"))
    if config.family == "bert" and config.mlm and not config.tied:
        # unused, but expected
        rows.append(by_name["cls.predictions.decoder.bias"]._replace(name="cls.predictions.bias"))
    return rows
