"""Reading safetensors files: a JSON header and the raw bytes of named arrays, mapped without copies.

Nothing here trusts the file: each length, shape and offset is checked against the bytes that are
really there before it is used.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.errors import FormatError
from lexmill.files import explain_os_errors, read_json, require_file

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# How each type lies in memory. bfloat16 and the 8-bit floats have no NumPy type: their bits are
# given as unsigned integers.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file, not in the data section
    end: int


class Weights:
    """Named arrays in one or more safetensors files. Open with `open_weights` or `SafetensorsFile.open`."""

    def names(self) -> list[str]:
        """Every tensor's name, in file order."""
        raise NotImplementedError

    def _file_of(self, name: str) -> SafetensorsFile:
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the files. Arrays that were given out stay valid."""
        raise NotImplementedError

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape.

        Raises:
            FormatError: there is no tensor of that name (likewise in the methods below).
        """
        return self._file_of(name)._entry(name).shape

    def dtype(self, name: str) -> str:
        """The stored type, as safetensors spells it: "F32", "BF16", "I64" and so on."""
        return self._file_of(name)._entry(name).dtype

    def array(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file. BF16 comes as its bits, in uint16."""
        return self._file_of(name)._view(name)

    def float32(self, name: str) -> np.ndarray:
        """The tensor as float32, exactly, from F32, F16 or BF16; rounded from F64.

        Raises:
            FormatError: the tensor is of another type.
        """
        dtype, array = self.dtype(name), self.array(name)
        if dtype == "BF16":
            return from_bfloat16(array)
        if dtype in ("F16", "F32", "F64"):
            with np.errstate(over="ignore"):
                return array.astype(np.float32, copy=False)
        raise FormatError(
            f"{self._file_of(name).path}: the tensor '{name}' has the type {dtype}, which is no float."
        )


class SafetensorsFile(Weights):
    """One safetensors file, mapped into memory.

    Attributes:
        path: where it lies.
        metadata: the strings under `__metadata__`.

    Format: https://github.com/huggingface/safetensors, "Format".
    """

    def __init__(
        self, path: Path, data: mmap.mmap, entries: dict[str, _Entry], metadata: dict[str, str]
    ) -> None:
        self.path, self.metadata = path, metadata
        self._data, self._entries = data, entries

    @classmethod
    def open(cls, path: Path | str) -> SafetensorsFile:
        """Map a file and check its header.

        Raises:
            FileError: it cannot be opened.
            FormatError: it is damaged; names the file, the tensor and what is wrong.
        """
        path = require_file(path, "safetensors file")
        with explain_os_errors(path, "read"), open(path, "rb") as file:
            size = path.stat().st_size
            if size < 8:
                raise FormatError(f"{path} has only {size} bytes; it is cut off.", "Copy the file again.")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            entries, metadata = _read_header(path, data)
        except BaseException:
            data.close()
            raise
        return cls(path, data, entries, metadata)

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def close(self) -> None:
        with contextlib.suppress(
            BufferError
        ):  # views were given out; the map goes when the last of them does
            self._data.close()

    def _file_of(self, name: str) -> SafetensorsFile:
        return self

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise FormatError(f"{self.path} has no tensor '{name}'.", "Is it the file of another model?")
        return self._entries[name]

    def _view(self, name: str) -> np.ndarray:
        entry = self._entry(name)
        dtype = DTYPES[entry.dtype]
        flat = np.frombuffer(self._data, dtype, (entry.end - entry.start) // dtype.itemsize, entry.start)
        return flat.reshape(entry.shape)


def _read_header(path: Path, data: mmap.mmap) -> tuple[dict[str, _Entry], dict[str, str]]:
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise FormatError(
            f"{path}: the header claims {length:,} bytes, but the file has {len(data):,}.",
            "It is cut off, or no safetensors file; copy it again.",
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise FormatError(f"{path}: the header names something twice.", "Copy the file again.")
        return dict(pairs)

    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: the header is not JSON ({str(error)[:100]}).", "Copy the file again."
        ) from error
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header should be a JSON object.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: '__metadata__' should hold strings only.")
    begin = 8 + length
    entries = {
        name: _read_entry(f"{path}: tensor '{name}'", value, begin, len(data))
        for name, value in header.items()
    }
    # The specification allows no byte that belongs to two tensors, or to none.
    position = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise FormatError(f"{path}: tensor '{name}' overlaps its neighbour, or leaves a gap before it.")
        position = entry.end
    if position != len(data):
        raise FormatError(
            f"{path}: {len(data) - position:,} bytes at the end belong to no tensor.", "Copy the file again."
        )
    return entries, metadata


def _read_entry(where: str, value: Any, begin: int, size: int) -> _Entry:
    def whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= 0

    if not isinstance(value, dict):
        raise FormatError(f"{where}: its entry should be a JSON object.")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where}: the type {dtype!r} is not known.", f"Known are: {', '.join(DTYPES)}.")
    # more axes than NumPy has, or sizes no file holds, are refused before they are multiplied
    if not isinstance(shape, list) or len(shape) > 32 or not all(whole(n) and n < 1 << 48 for n in shape):
        raise FormatError(f"{where}: the shape {str(shape)[:100]} is not a short list of sizes.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(whole(n) for n in offsets):
        raise FormatError(f"{where}: 'data_offsets' should be two numbers, but is {str(offsets)[:100]}.")
    start, end = begin + offsets[0], begin + offsets[1]
    if not start <= end <= size:
        raise FormatError(f"{where}: its bytes {start:,} to {end:,} are outside the file of {size:,} bytes.")
    needed = DTYPES[dtype].itemsize
    for axis in shape:  # Python's integers do not overflow
        needed *= axis
    if needed != end - start:
        raise FormatError(
            f"{where}: the shape {shape} of {dtype} needs {needed:,} bytes, but {end - start:,} are given."
        )
    return _Entry(dtype, tuple(shape), start, end)


class _ShardedWeights(Weights):
    def __init__(self, folder: Path, files: dict[str, SafetensorsFile], index: dict[str, str]) -> None:
        self.folder, self._files, self._index = folder, files, index

    def names(self) -> list[str]:
        return list(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _file_of(self, name: str) -> SafetensorsFile:
        if name not in self._index:
            raise FormatError(f"{self.folder / INDEX_NAME} has no tensor '{name}'.")
        return self._files[self._index[name]]


def open_weights(folder: Path | str) -> Weights:
    """Open the weights of a model directory, in one file or in shards with an index.

    Raises:
        FileError: neither `model.safetensors` nor its index is there, or a shard is missing.
        FormatError: a file is damaged, the index leads out of the folder, or disagrees with the shards.
    """
    folder = Path(folder)
    index_path = folder / INDEX_NAME
    if (folder / SINGLE_NAME).is_file() or not index_path.is_file():
        return SafetensorsFile.open(
            require_file(folder / SINGLE_NAME, "weights file", "Is the folder a complete model directory?")
        )
    value = read_json(index_path, "weights index")
    index = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(index, dict) or not index:
        raise FormatError(f"{index_path}: 'weight_map' is missing or empty.")
    files: dict[str, SafetensorsFile] = {}
    try:
        for name, shard in index.items():
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                raise FormatError(
                    f"{index_path}: {str(shard)[:100]!r} is not the name of a file in this folder."
                )
            if shard not in files:
                files[shard] = SafetensorsFile.open(folder / shard)
            if name not in files[shard]:
                raise FormatError(
                    f"{index_path}: tensor '{name}' is not in {shard}.", "Copy the model again."
                )
    except BaseException:
        for file in files.values():
            file.close()
        raise
    return _ShardedWeights(folder, files, index)


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """The bits of `array` as bfloat16, rounded to the nearest and halves to even; a NaN stays one.

    Returns:
        uint16, of the same shape.
    """
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # A NaN's payload could round up to infinity, or to zero: keep its top and make it a quiet NaN.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    result = np.where((bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000), quiet, rounded)
    return result.astype(np.uint16).reshape(np.shape(array))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits; exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
