"""Writing safetensors files: one tensor at a time, in one file or in shards with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lexmill.errors import ConfigError, FormatError
from lexmill.files import atomic_write, write_json
from lexmill.formats.safetensors import DTYPES, INDEX_NAME, MAX_HEADER_BYTES, SINGLE_NAME

# Above this, weights are cut into shards. transformers' own limit is ten times as high; most file
# systems and hubs take files of this size without ado.
SHARD_BYTES = 5_000_000_000
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BITS = ("BF16", "F8_E4M3", "F8_E5M2")  # which NumPy has only as unsigned integers
_NAME_OF = {dtype: name for name, dtype in reversed(DTYPES.items()) if name not in _BITS}


class TensorToWrite(NamedTuple):
    """A tensor that does not exist yet: `produce` makes it when its turn comes.

    `dtype` as safetensors spells it ("F32", "BF16"); `produce` gives an array of that type, of
    bfloat16 its bits in uint16.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    produce: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def parse_size(text: str) -> int:
    """Bytes from a text like "5GB", "300 MB" or "1000000".

    Raises:
        ConfigError: it is no size above zero.
    """
    plain = text.strip().upper()
    digits = plain.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = plain[len(digits) :].strip()
    try:
        size = int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError) as error:
        raise ConfigError(f"{text!r} is no size.", "Sizes are like 5GB, 300MB or 1000000.") from error
    if size < 1:
        raise ConfigError(f"The size {text!r} is not above zero.")
    return size


def write_safetensors(
    path: Path | str,
    tensors: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
    bfloat16: Collection[str] = (),
) -> None:
    """Write arrays as one safetensors file, atomically.

    Args:
        path: the final name.
        tensors: arrays of any shape and of a type in `DTYPES`.
        metadata: strings for `__metadata__`; transformers wants the default, {"format": "pt"}.
        bfloat16: the names whose arrays are uint16 holding bfloat16 bits (see `to_bfloat16`).

    Raises:
        FormatError: an array of a type that the format does not know.
        FileError: no space, no permission.
    """
    rows = [
        TensorToWrite(
            name,
            _type_name(path, name, array.dtype, name in bfloat16),
            array.shape,
            lambda name=name: tensors[name],  # type: ignore[misc]
        )
        for name, array in tensors.items()
    ]
    write_tensors(path, rows, metadata=metadata)


def write_tensors(
    path: Path | str, tensors: Iterable[TensorToWrite], *, metadata: Mapping[str, str] | None = None
) -> None:
    """`write_safetensors` for tensors that are made one after the other.

    Raises:
        FormatError: two tensors of one name, or one that is not what it said it would be.
        FileError: no space, no permission.
    """
    header: dict[str, object] = {"__metadata__": dict({"format": "pt"} if metadata is None else metadata)}
    # Wide types first, so that every tensor begins at a multiple of its own item size.
    rows = sorted(tensors, key=lambda row: (-DTYPES[row.dtype].itemsize, row.name))
    position = 0
    for row in rows:
        if row.name in header:
            raise FormatError(f"{path}: a tensor cannot be called '{row.name}', or two are.")
        end = position + row.nbytes
        header[row.name] = {"dtype": row.dtype, "shape": list(row.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(f"{path}: the names of {len(rows):,} tensors do not fit in a header of 100 MB.")
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for row in rows:
            array = np.ascontiguousarray(row.produce(), DTYPES[row.dtype])
            if array.size != math.prod(row.shape):
                raise FormatError(f"{path}: tensor '{row.name}' changed its shape while it was written.")
            file.write(array.reshape(-1).view(np.uint8).data)


def write_shards(folder: Path, tensors: Sequence[TensorToWrite], limit: int = SHARD_BYTES) -> list[Path]:
    """Write a model's weights into a folder: one file, or shards of at most `limit` bytes and their index.

    A tensor larger than the limit has a shard of its own. Names and index are transformers'.

    Returns:
        The files, the index among them.

    Raises:
        FormatError, FileError: as `write_tensors`.
    """
    shards: list[list[TensorToWrite]] = [[]]
    size = 0
    for row in tensors:
        if shards[-1] and size + row.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += row.nbytes
    if len(shards) == 1:
        write_tensors(folder / SINGLE_NAME, tensors)
        return [folder / SINGLE_NAME]
    index: dict[str, str] = {}
    files: list[Path] = []
    for number, shard in enumerate(shards, 1):
        files.append(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        write_tensors(files[-1], shard)
        index |= dict.fromkeys((row.name for row in shard), files[-1].name)
    totals = {
        "total_size": sum(row.nbytes for row in tensors),
        "total_parameters": sum(math.prod(row.shape) for row in tensors),
    }
    write_json(folder / INDEX_NAME, {"metadata": totals, "weight_map": dict(sorted(index.items()))})
    return [*files, folder / INDEX_NAME]


def _type_name(path: Path | str, name: str, dtype: np.dtype, is_bfloat16: bool) -> str:
    little = dtype.newbyteorder("<")
    if is_bfloat16:
        if little != np.dtype("<u2"):
            raise FormatError(
                f"{path}: bfloat16 tensor '{name}' should come as its bits in uint16, not {dtype}."
            )
        return "BF16"
    if little not in _NAME_OF:
        raise FormatError(f"{path}: tensor '{name}' has the type {dtype}, which safetensors does not know.")
    return _NAME_OF[little]
