"""Importance matrices: for each matrix of a model, how large what it is multiplied with is, column by column.

Two forms, both of llama.cpp (tools/imatrix/imatrix.cpp): a GGUF file with `general.type` = imatrix, and
the older one that usually ends in `.dat`. The sum of squares and the number of tokens are kept apart,
so that matrices of several runs can be added up; the older form holds their ratio times a small count.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from lexmill.errors import FormatError
from lexmill.files import atomic_write, explain_os_errors, require_file
from lexmill.formats.blocks import BLOCK_TYPES
from lexmill.formats.gguf import MAGIC, GGUFFile, TensorToWrite, array, string, u32, write_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DAMAGED = "The file is damaged or no importance matrix; make it with: lexmill imatrix."
_MAX_NAME = 4096  # bytes, of the older form


@dataclass(frozen=True)
class Entry:
    """One matrix.

    Attributes:
        sums: of the squares of what each column met: (experts, columns), float32. One expert where
            the model has none.
        counts: how many tokens each expert met: (experts,), float32.
    """

    sums: np.ndarray
    counts: np.ndarray

    def importance(self) -> np.ndarray:
        """The mean square of what each column met: (experts, columns); 1 for an expert that met nothing."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), 1).astype(np.float32)


@dataclass(frozen=True)
class ImportanceMatrix:
    """What was collected.

    Attributes:
        entries: by the names that tensors have in GGUF files.
        chunks: how many texts of `chunk_size` tokens it was collected over; 0 where a file does not say.
        chunk_size: tokens.
        datasets: what the texts were called.
    """

    entries: Mapping[str, Entry]
    chunks: int = 0
    chunk_size: int = 0
    datasets: tuple[str, ...] = field(default=())

    def importance(self, name: str, columns: int) -> np.ndarray | None:
        """Of a matrix without experts, (columns,); None if it is not among the entries.

        Raises:
            FormatError: it has another number of columns: the file belongs to another model.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.sums.shape != (1, columns):
            raise FormatError(
                f"The importance matrix has {entry.sums.shape} numbers for '{name}' instead of (1, {columns}).",
                "It was made with another model.",
            )
        return entry.importance()[0]


def write_imatrix(path: Path | str, matrix: ImportanceMatrix) -> None:
    """Write a file that llama.cpp reads: GGUF, or the older form where the name ends in `.dat`.

    Raises:
        FormatError: a name that the form cannot hold.
        FileError: no space, no permission.
    """
    path = Path(path)
    if path.suffix == ".dat":
        _write_old(path, matrix)
        return
    rows = []
    for name, entry in sorted(matrix.entries.items()):
        for ending, numbers in ((_SUMS, entry.sums), (_COUNTS, entry.counts[:, None])):
            data = np.ascontiguousarray(numbers, "<f4")
            rows.append(TensorToWrite(name + ending, data.shape, BLOCK_TYPES["F32"], partial(_itself, data)))
    metadata = {
        "general.type": string("imatrix"),
        "imatrix.datasets": array("string", matrix.datasets),
        "imatrix.chunk_count": u32(matrix.chunks),
        "imatrix.chunk_size": u32(matrix.chunk_size),
    }
    write_gguf(path, metadata, rows)


def _itself(data: np.ndarray) -> np.ndarray:
    return data


def _write_old(path: Path, matrix: ImportanceMatrix) -> None:
    """int32 throughout: entries; then of each: name, calls, values; then calls and the data set's name."""

    def text(value: str) -> bytes:
        data = value.encode("utf-8")
        return struct.pack("<i", len(data)) + data

    parts = [struct.pack("<i", len(matrix.entries))]
    for name, entry in sorted(matrix.entries.items()):
        calls = max(1, -(-int(entry.counts.max()) // max(matrix.chunk_size, 1)))
        values = (entry.importance() * np.float32(calls)).astype("<f4")
        parts += [text(name), struct.pack("<ii", calls, values.size), values.tobytes()]
    parts += [struct.pack("<i", matrix.chunks), text(matrix.datasets[-1] if matrix.datasets else "")]
    with atomic_write(path) as file:
        file.write(b"".join(parts))


def read_imatrix(path: Path | str) -> ImportanceMatrix:
    """Read a file of either form.

    Raises:
        FileError: it cannot be opened.
        FormatError: it is damaged, no importance matrix, or holds numbers that are negative or not finite.
    """
    path = require_file(path, "importance matrix")
    with explain_os_errors(path, "read"), open(path, "rb") as file:
        start = file.read(len(MAGIC))
    matrix = _read_gguf(path) if start == MAGIC else _read_old(path)
    if not matrix.entries:
        raise FormatError(f"{path}: there are no entries.", _DAMAGED)
    for name, entry in matrix.entries.items():
        for numbers in (entry.sums, entry.counts):
            if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
                raise FormatError(f"{path}: '{name}' has numbers that are negative or not finite.", _DAMAGED)
    return matrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    with GGUFFile.open(path) as file:
        kind = file.metadata.get("general.type")
        if kind != "imatrix":
            raise FormatError(f"{path} is a GGUF file of the type {str(kind)[:60]!r}.", _DAMAGED)
        names = {
            info.removesuffix(ending)
            for info in file.tensors
            for ending in (_SUMS, _COUNTS)
            if info.endswith(ending)
        }
        entries = {}
        for name in sorted(names):
            if name + _SUMS not in file.tensors or name + _COUNTS not in file.tensors:
                raise FormatError(
                    f"{path}: '{name}' has sums without counts, or counts without sums.", _DAMAGED
                )
            sums, counts = file.read(name + _SUMS), file.read(name + _COUNTS).reshape(-1)
            if not counts.size or sums.size % counts.size or not sums.size:
                raise FormatError(
                    f"{path}: '{name}' has {sums.size} sums for {counts.size} counts.", _DAMAGED
                )
            entries[name] = Entry(sums.reshape(len(counts), -1), counts)
        return ImportanceMatrix(
            entries,
            _whole(file, "imatrix.chunk_count"),
            _whole(file, "imatrix.chunk_size"),
            tuple(
                map(str, file.metadata["imatrix.datasets"])
                if file.types.get("imatrix.datasets") == "array of string"
                else ()
            ),
        )


def _whole(file: GGUFFile, key: str) -> int:
    return int(file.metadata[key]) if file.types.get(key) in ("u32", "i32", "u64", "i64") else 0


class _Reader:
    """Reads on in bytes, and refuses whatever is not there."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.position = path, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def count(self, what: str, most: int) -> int:
        """An int32 from 0 to `most`."""
        if self.left < 4:
            raise FormatError(f"{self.path}: {what} is cut off at byte {self.position:,}.", _DAMAGED)
        (value,) = struct.unpack_from("<i", self.data, self.position)
        if not 0 <= value <= most:
            raise FormatError(f"{self.path}: {what} is {value:,} (at byte {self.position:,}).", _DAMAGED)
        self.position += 4
        return int(value)

    def take(self, size: int, what: str) -> bytes:
        """The next `size` bytes."""
        if size > self.left:
            raise FormatError(
                f"{self.path}: {what} needs {size:,} bytes, but {self.left:,} are left.", _DAMAGED
            )
        self.position += size
        return self.data[self.position - size : self.position]

    def text(self, what: str) -> str:
        data = self.take(self.count(f"the length of {what}", _MAX_NAME), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path}: {what} is not valid UTF-8.", _DAMAGED) from error


def _read_old(path: Path) -> ImportanceMatrix:
    """As `_write_old`; older tools leave out what comes after the entries."""
    with explain_os_errors(path, "read"):
        reader = _Reader(path, path.read_bytes())
    most = 2**31 - 1
    entries: dict[str, Entry] = {}
    # the smallest entry takes 17 bytes: a name of one byte, three numbers, one value
    for number in range(reader.count("the number of entries", reader.left // 17)):
        name = reader.text(f"the name of entry {number}")
        calls = reader.count(f"the calls of '{name[:60]}'", most)
        values = reader.count(f"the number of values of '{name[:60]}'", most)
        data = np.frombuffer(reader.take(4 * values, f"'{name[:60]}'"), "<f4")
        if not name or name in entries or not values or not calls:
            raise FormatError(f"{path}: entry {number} ('{name[:60]}') is empty or there twice.", _DAMAGED)
        entries[name] = Entry(data[None].astype(np.float32), np.array([calls], np.float32))
    chunks = reader.count("the number of chunks", most) if reader.left else 0
    name = reader.text("the name of the data") if reader.left else ""
    # A count here is one of chunks, whose size the form does not hold; only ratios are used.
    return ImportanceMatrix(entries, chunks, 1, (name,) if name else ())
