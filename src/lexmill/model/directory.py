"""Model directories: reading and writing what is exactly a Hugging Face directory. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.errors import FileError, ModelError
from lexmill.files import atomic_directory, read_json, require_file, require_space, write_json
from lexmill.formats.safetensors import Weights, open_weights, write_safetensors
from lexmill.model.config import ModelConfig
from lexmill.model.names import weight_names, weight_shapes
from lexmill.tokenizer.tokenizer import Tokenizer

LINEAGE_FILE = "lexmill.json"
_COMPLETE = "Is the folder a complete model directory? Make or copy it again."


class ModelDirectory:
    """A model on disk.

    Attributes:
        path: the folder.
        config: the model's shape.
        tokenizer: its tokenizer, special ids and chat template.
        lineage: what `lexmill.json` says of its making; empty for models made by others.
    """

    def __init__(
        self, path: Path, config: ModelConfig, tokenizer: Tokenizer, lineage: dict[str, Any], weights: Weights
    ) -> None:
        self.path, self.config, self.tokenizer, self.lineage = path, config, tokenizer, lineage
        self._weights = weights
        self._names = {name.own: name.huggingface for name in weight_names(config)}

    def weight(self, own_name: str) -> np.ndarray:
        """One weight as float32, by lexmill's name for it."""
        return self._weights.float32(self._names[own_name])

    def weight_dtype(self, own_name: str) -> str:
        """How it is stored: "F32", "BF16" or "F16"."""
        return self._weights.dtype(self._names[own_name])

    def weights(self) -> dict[str, np.ndarray]:
        """Every weight as float32, by lexmill's names."""
        return {own: self.weight(own) for own in self._names}

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
        config = ModelConfig.from_huggingface(values, str(config_path))
        tokenizer = Tokenizer.load(path)
        if tokenizer.vocab_size > config.vocab_size:
            raise ModelError(
                f"{path}: the tokenizer has {tokenizer.vocab_size:,} tokens, but the model only {config.vocab_size:,}.",
                "tokenizer.json and config.json come from different models.",
            )
        weights = open_weights(path)
        for name, shape in zip(weight_names(config), weight_shapes(config).values()):
            if name.huggingface not in weights:
                raise ModelError(f"{path}: the weight '{name.huggingface}' is missing.", _COMPLETE)
            if weights.shape(name.huggingface) != shape:
                raise ModelError(
                    f"{path}: the weight '{name.huggingface}' has the shape {weights.shape(name.huggingface)}, "
                    f"but config.json asks for {shape}.",
                    "config.json and model.safetensors come from different models.",
                )
        lineage = read_json(path / LINEAGE_FILE, "lineage") if (path / LINEAGE_FILE).is_file() else {}
        return cls(path, config, tokenizer, lineage if isinstance(lineage, dict) else {}, weights)


def write_model_directory(
    path: Path | str,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    lineage: Mapping[str, Any] | None = None,
) -> ModelDirectory:
    """Write a complete model directory, whole or not at all, and open it.

    Args:
        weights: every weight by lexmill's name, float32.
        lineage: recipe, data and tokenizer hashes, steps, scores; goes to `lexmill.json`.

    Raises:
        FileError: no space or no permission.
        ModelError: the tokenizer does not fit the vocabulary.
    """
    path = Path(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens, the model only {config.vocab_size:,}."
        )
    require_space(path.parent, int(1.1 * sum(weight.nbytes for weight in weights.values())), "The model")
    with atomic_directory(path) as folder:
        ids = tokenizer.ids
        write_json(
            folder / "config.json",
            config.to_huggingface()
            | {
                "bos_token_id": ids.bos,
                "eos_token_id": list(ids.stop),
                "pad_token_id": ids.pad,
                "dtype": "float32",
                "torch_dtype": "float32",  # transformers 4 reads this name
            },
        )
        write_safetensors(
            folder / "model.safetensors",
            {
                name.huggingface: np.ascontiguousarray(weights[name.own], np.float32)
                for name in weight_names(config)
            },
            metadata={"format": "pt"},
        )
        tokenizer.save(folder, context=config.context)
        write_json(folder / LINEAGE_FILE, dict(lineage or {}))
    return ModelDirectory.open(path)
