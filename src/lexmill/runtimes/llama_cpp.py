"""Models for llama.cpp: a model directory as one GGUF file. `LlamaCpp` runs such a file."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from lexmill.config import suggest
from lexmill.errors import ConfigError, FormatError, LexmillError
from lexmill.files import explain_os_errors, partial_name
from lexmill.formats.blocks import BLOCK_TYPES, BlockType, encode
from lexmill.formats.gguf import GGUFFile, TensorToWrite, Value, string, u32, write_gguf
from lexmill.model.directory import ModelDirectory
from lexmill.model.names import WeightName, weight_shapes
from lexmill.progress import SILENT, Progress, Task
from lexmill.runtimes.gguf_kept import restored, same_value
from lexmill.runtimes.gguf_shapes import (
    held_weights,
    permute_rope,
    require_place,
    shape_metadata,
    stays_f32,
    unpermute_rope,
    weight_from_gguf,
    weight_in_gguf,
)
from lexmill.runtimes.gguf_tokenizer import tokenizer_metadata
from lexmill.runtimes.llama_cpp_server import LlamaCpp, RuntimeFailure

__all__ = [
    "FILE_TYPES",
    "LlamaCpp",
    "RuntimeFailure",
    "export_gguf",
    "file_weights",
    "permute_rope",
    "setting_differences",
    "unpermute_rope",
    "weight_error",
]

# What a user may ask for, and general.file_type, which labels the file. Mixtures such as q4_k_m
# will choose a type a tensor; `_type_of` is the place for that.
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}


def export_gguf(
    model: ModelDirectory | Path | str, out: Path | str, type: str = "f16", progress: Progress = SILENT
) -> Path:
    """Write a model directory as one GGUF file, atomically, and read it back before it gets its name.

    Args:
        model: a Llama, Qwen2, Qwen3, BERT or T5 model, or its path. Of BERT the file holds what embeds
            texts, not the heads.
        out: the file, e.g. `model-f16.gguf`.
        type: of the matrices: "f32", "f16", "bf16" or "q8_0". Norms and biases are always f32.

    Returns:
        `out`.

    Raises:
        ConfigError: an unknown type.
        ModelError: a tokenizer or shape that llama.cpp cannot hold.
        FormatError: a weight that the type cannot hold.

    Keys and names follow llama.cpp: src/llama-arch.cpp, gguf-py/gguf/constants.py.
    """
    name = type.lower()
    if name not in FILE_TYPES:
        raise ConfigError(f"The GGUF type '{type}' is not supported.", suggest(name, FILE_TYPES))
    model = model if isinstance(model, ModelDirectory) else ModelDirectory.open(model)
    out = Path(out)
    require_place(model.config, str(model.path))
    metadata = _metadata(model, name)
    unfinished = partial_name(out)
    with explain_os_errors(out, "write"):
        try:
            with progress.task(f"writing {out.name}", model.config.parameters, "weights") as task:
                writer = _Tensors(model, BLOCK_TYPES[name.upper()], task)
                write_gguf(unfinished, metadata, writer.rows())
            _check_written(unfinished, metadata, writer)
            os.replace(unfinished, out)
        finally:
            unfinished.unlink(missing_ok=True)
    return out


def _metadata(model: ModelDirectory, type: str) -> dict[str, Value]:
    config = model.config
    general = {
        "general.architecture": string(config.family),
        "general.type": string("model"),
        "general.name": string(str(model.lineage.get("name") or model.path.resolve().name)),
        "general.file_type": u32(FILE_TYPES[type]),
    }
    if BLOCK_TYPES[type.upper()].quantised:
        general["general.quantization_version"] = u32(2)
    metadata = (
        general
        | shape_metadata(config, model.pooling)
        | tokenizer_metadata(model.tokenizer, config.vocab_size, str(model.path))
    )
    return metadata | restored(model.lineage, model.tokenizer, metadata)


class _Tensors:
    """Makes each tensor's bytes when asked, and remembers their checksums."""

    def __init__(self, model: ModelDirectory, type: BlockType, task: Task) -> None:
        self.model, self.type, self.task = model, type, task
        self.checksums: dict[str, int] = {}

    def rows(self) -> Iterator[TensorToWrite]:
        config = self.model.config
        shapes = weight_shapes(config)
        for name in held_weights(config):
            shape = shapes[name.own]
            kind = _type_of(name, shape, self.type)
            yield TensorToWrite(name.gguf, shape, kind, partial(self._produce, name, kind))

    def _produce(self, name: WeightName, kind: BlockType) -> np.ndarray:
        weight = weight_in_gguf(self.model, name)
        try:
            data = encode(weight, kind)
        except LexmillError as error:
            where = f"{self.model.path}: weight '{name.huggingface}'"
            raise FormatError(f"{where}: {error.message}", error.hint) from error
        self.checksums[name.gguf] = zlib.crc32(data.data)
        self.task.advance(weight.size)
        return data


def _type_of(name: WeightName, shape: tuple[int, ...], wanted: BlockType) -> BlockType:
    """Norms and biases stay f32; rows that do not divide into blocks become f16, as llama.cpp does."""
    if stays_f32(name, shape):
        return BLOCK_TYPES["F32"]
    return wanted if wanted.fits(shape) else BLOCK_TYPES["F16"]


def _check_written(path: Path, metadata: dict[str, Value], writer: _Tensors) -> None:
    """What is on the disk is what was meant, or it does not get its name."""
    with GGUFFile.open(path) as file:
        wrong = [key for key, value in metadata.items() if not same_value(value, file.metadata.get(key))]
        wrong += [
            row.name
            for row in writer.rows()
            if (info := file.tensors.get(row.name)) is None
            or (info.shape, info.type) != (row.shape, row.type)
        ]
        wrong += [name for name, crc in writer.checksums.items() if zlib.crc32(file.raw(name).data) != crc]
        if wrong or len(file.tensors) != len(writer.checksums):
            raise FormatError(
                f"{path}: read back, '{(wrong or ['the tensor count'])[0]}' differs from what was written.",
                "Check the disk, then run the same command again.",
            )


# Half a step of each type, as a share of the largest weight in its block: 2^-11, 2^-8, and 1/254 plus
# the rounding of the scale to f16. Norms and biases are f32 in every file: they must be exact.
_HALF_STEPS = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 254 + 2.0**-10}


def weight_error(file: GGUFFile, model: ModelDirectory) -> tuple[float, str]:
    """The largest error of a weight in a GGUF file, and the tensor where it is.

    Returns:
        The error as a multiple of the largest that the tensor's type explains, so that up to 1 is
        rounding; infinite where a tensor is missing, has another shape or should be exact; and the
        tensor's name.

    Raises:
        FormatError: a tensor of a type that cannot be read yet.
    """
    worst, where = 0.0, "none"
    for name in held_weights(model.config):
        weight = weight_in_gguf(model, name)
        info = file.tensors.get(name.gguf)
        if info is None or info.shape != weight.shape:
            return float("inf"), f"{name.gguf} is missing or has another shape"
        if info.type.name not in _HALF_STEPS:
            raise FormatError(f"{file.path}: the error of {info.type.name} tensors is not known.")
        block = 32 if weight.shape[-1] % 32 == 0 else weight.shape[-1]
        error = np.abs(file.read(name.gguf) - weight).reshape(-1, block).max(-1)
        allowed = np.abs(weight).reshape(-1, block).max(-1) * _HALF_STEPS[info.type.name]
        # half-precision numbers, scales among them, end at 2^-24
        allowed = np.maximum(allowed, 0 if info.type.name == "F32" else 2.0**-24)
        share = float(np.max(np.where(error == 0, 0, error / np.maximum(allowed, _TINY))))
        if not share <= worst:  # true for NaN
            worst, where = share, name.gguf
    return worst, where


_TINY = float(np.finfo(np.float32).tiny)


def file_weights(file: GGUFFile, model: ModelDirectory) -> dict[str, np.ndarray]:
    """Every weight as a GGUF file holds it, float32, by lexmill's name and in lexmill's order of rows.

    Heads that llama.cpp has no place for are the model's own.

    Raises:
        FormatError: a tensor is missing, or of a type that cannot be read yet.
    """
    held = held_weights(model.config)
    owns = {name.own for name in held}
    weights = {own: model.weight(own) for own in weight_shapes(model.config) if own not in owns}
    for name in held:
        if name.own not in weights:  # the embedding once, not as a projection too
            weights[name.own] = weight_from_gguf(file.read(name.gguf), model.config, name)
    return weights


def setting_differences(file: GGUFFile, model: ModelDirectory) -> list[str]:
    """What a file says of the model's shape that is not so: one text a setting; what it leaves out is no error."""
    expected = shape_metadata(model.config, model.pooling)
    return [
        f"{key} is {file.metadata[key]} instead of {value.value}"
        for key, value in expected.items()
        if key in file.metadata and not same_value(value, file.metadata[key])
    ]
