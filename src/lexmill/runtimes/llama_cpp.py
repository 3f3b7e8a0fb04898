"""Models for llama.cpp: a model directory as one GGUF file. `LlamaCpp` runs such a file."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from lexmill.config import suggest
from lexmill.errors import ConfigError, FormatError, LexmillError
from lexmill.files import explain_os_errors, partial_name
from lexmill.formats.blocks import BLOCK_TYPES, BlockType, encode
from lexmill.formats.blocks32 import halves
from lexmill.formats.gguf import GGUFFile, TensorToWrite, Value, string, u32, write_gguf
from lexmill.formats.imatrix import ImportanceMatrix, read_imatrix
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory
from lexmill.model.gguf_rope import ROPE_FREQS, divisors_differ, frequency_divisors
from lexmill.model.gguf_shapes import (
    HeldTensor,
    architecture,
    held_tensors,
    held_weights,
    permute_rope,
    read_weight,
    require_place,
    shape_metadata,
    unpermute_rope,
    weight_from_gguf,
    weight_in_gguf,
)
from lexmill.model.names import weight_shapes
from lexmill.progress import SILENT, Progress, Task
from lexmill.runtimes.gguf_kept import asked, restored, same_value
from lexmill.runtimes.gguf_mixes import ALIASES, MIXES, choose_types
from lexmill.runtimes.gguf_tokenizer import model_name, tokenizer_metadata
from lexmill.runtimes.llama_cpp_server import LlamaCpp, RuntimeFailure

__all__ = [
    "FILE_TYPES",
    "LlamaCpp",
    "RuntimeFailure",
    "export_gguf",
    "file_offsets",
    "file_types",
    "file_weights",
    "permute_rope",
    "setting_differences",
    "tensor_error",
    "unpermute_rope",
    "weight_error",
]

FILE_TYPES = {name: mix.number for name, mix in MIXES.items()}  # general.file_type labels a file


def export_gguf(
    model: ModelDirectory | Path | str,
    out: Path | str,
    type: str = "f16",
    progress: Progress = SILENT,
    importance: ImportanceMatrix | Path | str | None = None,
) -> Path:
    """Write a model directory as one GGUF file, atomically, and read it back before it gets its name.

    Args:
        model: a Llama, Qwen2, Qwen3, BERT, ModernBERT or T5 model, or its path. Of encoders the file
            holds what embeds texts, not the heads.
        out: the file, e.g. `model-f16.gguf`.
        type: one of `FILE_TYPES` in any case, e.g. "f16" or "q4_k_m"; which tensor gets which type is
            llama.cpp's choice (`gguf_mixes.py`). Norms and biases are always f32.
        importance: an importance matrix of this model, or its file; what has no entry is quantised without.

    Returns:
        `out`.

    Raises:
        ConfigError: an unknown type.
        ModelError: a tokenizer or shape that llama.cpp cannot hold.
        FormatError: a weight that the type cannot hold; an importance matrix that is damaged or not this
            model's.

    Keys and names follow llama.cpp: src/llama-arch.cpp, gguf-py/gguf/constants.py.
    """
    name = ALIASES.get(type.lower(), type.lower())
    if name not in FILE_TYPES:
        raise ConfigError(f"The GGUF type '{type}' is not supported.", suggest(name, [*FILE_TYPES, *ALIASES]))
    model = model if isinstance(model, ModelDirectory) else ModelDirectory.open(model)
    out = Path(out)
    require_place(model.config, str(model.path))
    metadata = _metadata(model, name)
    if importance is not None:
        source = "" if isinstance(importance, ImportanceMatrix) else Path(importance).name
        importance = importance if isinstance(importance, ImportanceMatrix) else read_imatrix(importance)
        metadata |= _importance_metadata(importance, source)
    unfinished = partial_name(out)
    with explain_os_errors(out, "write"):
        try:
            with progress.task(f"writing {out.name}", model.config.parameters, "weights") as task:
                writer = _Tensors(model, name, importance, task)
                writer.tell_replaced(progress)
                write_gguf(unfinished, metadata, writer.rows())
            _check_written(unfinished, metadata, writer)
            os.replace(unfinished, out)
        finally:
            unfinished.unlink(missing_ok=True)
    return out


def _metadata(model: ModelDirectory, mix: str) -> dict[str, Value]:
    config, name = model.config, str(model.lineage.get("name") or model.path.resolve().name)
    general = {
        "general.architecture": string(architecture(config)),
        "general.type": string("model"),
        "general.name": string(model_name(name, model.tokenizer)),
        "general.file_type": u32(FILE_TYPES[mix]),
    }
    if BLOCK_TYPES[MIXES[mix].default].quantised:
        general["general.quantization_version"] = u32(2)
    metadata = (
        general
        | shape_metadata(config, model.pooling)
        | tokenizer_metadata(model.tokenizer, config.vocab_size, str(model.path))
    )
    return metadata | asked(model.lineage) | restored(model.lineage, model.tokenizer, metadata)


def _importance_metadata(matrix: ImportanceMatrix, source: str) -> dict[str, Value]:
    """As llama-quantize records it (tools/quantize/quantize.cpp)."""
    found = {
        "quantize.imatrix.file": string(source or "not from a file"),
        "quantize.imatrix.entries_count": u32(len(matrix.entries)),
    }
    if matrix.datasets:
        found["quantize.imatrix.dataset"] = string(matrix.datasets[-1])
    if matrix.chunks:
        found["quantize.imatrix.chunks_count"] = u32(matrix.chunks)
    return found


class _Tensors:
    """Chooses each tensor's type, makes its bytes when asked, and remembers their checksums."""

    def __init__(
        self, model: ModelDirectory, mix: str, importance: ImportanceMatrix | None, task: Task
    ) -> None:
        self.model, self.importance, self.task = model, importance, task
        self.tensors = held_tensors(model.config)
        matrices = {tensor.name: tensor.shape for tensor in self.tensors if not tensor.stays_f32}
        self.choices = choose_types(mix, matrices, model.config, importance=importance is not None)
        self.checksums: dict[str, int] = {}
        known = importance.entries if importance is not None else {}
        if importance is not None and not known.keys() & matrices.keys():
            raise FormatError(
                f"The importance matrix names none of the matrices of {model.path}.",
                "Make it with this model: lexmill imatrix.",
            )

    def tell_replaced(self, progress: Progress) -> None:
        """Say which matrices do not get the type that was asked for."""
        replaced = Counter(
            f"{choice.wanted.name} becomes {choice.type.name}"
            for choice in self.choices.values()
            if choice.type != choice.wanted
        )
        for what, count in sorted(replaced.items()):
            progress.say(
                f"{what} in {count} of {len(self.choices)} matrices, whose rows do not divide into its blocks."
            )

    def rows(self) -> Iterator[TensorToWrite]:
        divisors = frequency_divisors(self.model.config)
        if divisors is not None:
            yield TensorToWrite(
                ROPE_FREQS, divisors.shape, BLOCK_TYPES["F32"], partial(self._keep, ROPE_FREQS, divisors)
            )
        for tensor in self.tensors:
            choice = self.choices.get(tensor.name)
            kind = choice.type if choice else BLOCK_TYPES["F32"]
            yield TensorToWrite(tensor.name, tensor.shape, kind, partial(self._produce, tensor, kind))

    def _produce(self, tensor: HeldTensor, kind: BlockType) -> np.ndarray:
        weight = tensor.made_of(self.model)
        try:
            column = None
            if self.importance is not None and kind.quantised:
                column = self.importance.importance(tensor.name, weight.shape[-1])
            data = encode(weight, kind, column)
        except LexmillError as error:
            where = f"{self.model.path}: weight '{tensor.parts[0].huggingface}'"
            raise FormatError(f"{where}: {error.message}", error.hint) from error
        self.task.advance(weight.size)
        return self._keep(tensor.name, data)

    def _keep(self, name: str, data: np.ndarray) -> np.ndarray:
        self.checksums[name] = zlib.crc32(data.data)
        return data


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
# Types with fewer bits: a search may cut off single weights, so a row is judged as a whole.
_BITS = {
    "Q6_K": 6,
    "Q5_0": 5,
    "Q5_1": 5,
    "Q5_K": 5,
    "Q4_0": 4,
    "Q4_1": 4,
    "Q4_K": 4,
    "IQ4_NL": 4,
    "IQ4_XS": 4,
}


def weight_error(file: GGUFFile, model: ModelDirectory) -> tuple[float, str]:
    """The largest error of a weight in a GGUF file, and the tensor where it is.

    Returns:
        The error as a multiple of the largest that the tensor's type explains, so that up to 1 is
        rounding; infinite where a tensor is missing, has another shape or should be exact; and the
        tensor's name. Of types below 8 bits it is the root mean square over the worst row.

    Raises:
        FormatError: a tensor of a type that cannot be read yet.
    """
    if differs := divisors_differ(file, model.config):
        return float("inf"), differs
    worst, where = 0.0, "none"
    for name in held_weights(model.config):
        weight = weight_in_gguf(model, name)
        info = file.tensors.get(name.gguf)
        if info is None or info.shape != name.whole_shape(weight.shape):
            return float("inf"), f"{name.gguf} is missing or has another shape"
        share = tensor_error(read_weight(file, name), weight, info.type.name)
        if not share <= worst:  # true for NaN
            worst, where = share, name.gguf
    return worst, where


def tensor_error(found: np.ndarray, weight: np.ndarray, type: str) -> float:
    """How far a tensor is from a weight, as a multiple of what its type explains; up to 1 is rounding.

    Raises:
        FormatError: the rounding of this type is not known.
    """
    error = np.abs(found - weight)
    if type in _HALF_STEPS:
        return _largest_share(error, weight, type)
    if type in _BITS:
        return _row_share(error, weight, _BITS[type])
    raise FormatError(f"The error of {type} tensors is not known.")


def _largest_share(error: np.ndarray, weight: np.ndarray, type: str) -> float:
    """The largest error as a multiple of half a step."""
    block = 32 if weight.shape[-1] % 32 == 0 else weight.shape[-1]
    allowed = np.abs(weight).reshape(-1, block).max(-1) * _HALF_STEPS[type]
    # half-precision numbers, scales among them, end at 2^-24
    allowed = np.maximum(allowed, 0 if type == "F32" else 2.0**-24)
    largest = error.reshape(-1, block).max(-1)
    return float(np.max(np.where(largest == 0, 0, largest / np.maximum(allowed, _TINY))))


def _row_share(error: np.ndarray, weight: np.ndarray, bits: int) -> float:
    """The root mean square error of the worst row, as a multiple of three times that of rounding to whole steps.

    So many bits cut the range from minus to plus a block's largest weight into 2^bits steps, and rounding
    to them is off by step / sqrt(12) in the root mean square. Three times that leaves room for searches
    with importance, which cut unimportant weights off (docs/decisions.md).
    """
    rows = len(weight)
    peaks = np.abs(weight).reshape(rows, -1, 32).max(-1)
    allowed = 3 * (2.0 / 2**bits) / np.sqrt(12) * np.sqrt(np.square(peaks).mean(-1))
    allowed = np.maximum(allowed, 2.0**-20)  # tiny weights: 6-bit scales of half-precision units
    return float((np.sqrt(np.square(error).reshape(rows, -1).mean(-1)) / allowed).max())


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
            weights[name.own] = weight_from_gguf(read_weight(file, name), model.config, name)
    return weights


def file_types(file: GGUFFile, config: ModelConfig) -> dict[str, str]:
    """The type that each weight has in a file, by lexmill's names; of one held twice, that of the projection."""
    return {name.own: file.tensors[name.gguf].type.name for name in held_weights(config)}


def file_offsets(file: GGUFFile, config: ModelConfig) -> dict[str, np.ndarray]:
    """What Q4_1 and Q5_1 add to each block of 32 weights: (rows, blocks) float32, in lexmill's order of rows."""
    found = {}
    for name in held_weights(config):
        info = file.tensors[name.gguf]
        if info.type.name in _WITH_OFFSETS:
            blocks = file.raw(name.gguf).reshape(-1, info.type.block_bytes)
            rows = halves(blocks, 2).reshape(*info.shape[:-1], -1)  # behind the scale
            found[name.own] = weight_from_gguf(rows, config, name)
    return found


_WITH_OFFSETS = ("Q4_1", "Q5_1")


def setting_differences(file: GGUFFile, model: ModelDirectory) -> list[str]:
    """What a file says of the model's shape that is not so: one text a setting; what it leaves out is no error."""
    expected = shape_metadata(model.config, model.pooling)
    return [
        f"{key} is {file.metadata[key]} instead of {value.value}"
        for key, value in expected.items()
        if key in file.metadata and not same_value(value, file.metadata[key])
    ]
