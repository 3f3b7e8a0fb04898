"""Weights as the engine reads them (`native/engine/engine.h`, Matrix), and the file that keeps them so.

Types of files become the nearest of five without a loss that matters beside the rounding of what they are
multiplied with: those of 4 bits and of 8 keep their numbers, those of 5 get 8 bits with the same numbers, others
are rounded to 8 bits anew. The file `….packed` is made once and mapped from then on.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lexmill.errors import FileError, FormatError
from lexmill.files import atomic_write, sha256_json
from lexmill.formats.blocks import BLOCK_TYPES, decode
from lexmill.inference.native.library import MatrixStruct, library
from lexmill.inference.native.sources import Source, Stored
from lexmill.model.names import weight_shapes

FLOAT32, FLOAT16, BFLOAT16, EIGHT_BITS, FOUR_BITS = range(5)
_VERSION = 1
# What each type becomes, and whether its blocks have a least value.
_BECOMES = {
    "F32": (FLOAT32, False),
    "F16": (FLOAT16, False),
    "BF16": (BFLOAT16, False),
    "Q8_0": (EIGHT_BITS, False),
    "Q5_0": (EIGHT_BITS, False),
    "Q5_1": (EIGHT_BITS, True),
    "Q5_K": (EIGHT_BITS, True),
    "Q4_0": (FOUR_BITS, False),
    "Q4_1": (FOUR_BITS, True),
    "Q4_K": (FOUR_BITS, True),
}
_BYTES_A_BLOCK = {
    FLOAT32: 2048,
    FLOAT16: 1024,
    BFLOAT16: 1024,
    EIGHT_BITS: 512,
    FOUR_BITS: 256,
}  # 16 rows, 32 columns
_MAGIC = b"LEXPACK1"
_LINE = 64  # bytes; what a core reads at once


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix in the engine's form; `minima` and `scales` are empty where its type has none."""

    type: int
    rows: int
    columns: int
    values: np.ndarray
    scales: np.ndarray
    minima: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.minima.nbytes

    def struct(self) -> Any:
        """For the compiled code; valid as long as this is."""
        addresses = [
            part.ctypes.data if part.size else None for part in (self.values, self.scales, self.minima)
        ]
        return MatrixStruct(self.type, self.rows, self.columns, *addresses)


class _Row(NamedTuple):
    """How a matrix is laid out."""

    type: int
    least: bool
    rows: int
    columns: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of values, scales and minima."""
        blocks = 2 * -(-self.rows // 32) * -(-self.columns // 32)
        scales = blocks * 32 if self.type >= EIGHT_BITS else 0
        return blocks * _BYTES_A_BLOCK[self.type], scales, scales if self.least else 0


def _plan_of(stored: Stored) -> tuple[int, bool]:
    return _BECOMES.get(stored.type.name, (EIGHT_BITS, False))


def pack(stored: Stored, room: np.ndarray | None = None, threads: int = 1) -> Packed:
    """Lay a matrix out.

    Args:
        room: flat uint8, zeros, of the right size; made where not given.
    """
    row = _Row(*_plan_of(stored), *stored.shape)
    if room is None:
        room = np.zeros(sum(row.sizes), np.uint8)
    data, source, order = stored.data, stored.type.id, stored.order
    if stored.type.name not in _BECOMES:
        numbers = decode(data, stored.type, stored.shape)
        data, source = (
            np.ascontiguousarray(numbers, np.float32).reshape(-1).view(np.uint8),
            BLOCK_TYPES["F32"].id,
        )
    values, scales, minima = np.split(room, np.cumsum(row.sizes)[:2])
    packed = Packed(row.type, row.rows, row.columns, values, scales, minima)
    data = np.ascontiguousarray(data)
    library().lexmill_engine_pack(
        packed.struct(),
        source,
        data.ctypes.data,
        None if order is None else order.ctypes.data,
        values.ctypes.data,
        scales.ctypes.data if scales.size else None,
        minima.ctypes.data if minima.size else None,
        threads,
    )
    return packed


def load_packed(source: Source, names: Sequence[str], threads: int, *, keep: bool = True) -> list[Packed]:
    """The matrices of a model in the engine's form: from the file that keeps them, or made anew.

    Args:
        keep: write that file where there is none, or an old one; where it cannot be written, all goes on without.
    """
    key = _key(source, names)
    shapes = weight_shapes(source.config)
    stored = [_checked(source, name, shapes[name]) for name in names]
    rows = [_Row(*_plan_of(one), *one.shape) for one in stored]
    found = _open(source.packed, key, rows)
    if found is not None:
        return found
    sizes = [_padded(sum(row.sizes)) for row in rows]
    if keep and _write(source.packed, key, stored, sizes, threads):
        found = _open(source.packed, key, rows)
        if found is not None:
            return found
    room = _huge(sum(sizes))
    places = np.cumsum([0, *sizes])
    return [
        pack(one, room[place : place + sum(row.sizes)], threads)
        for one, row, place in zip(stored, rows, places)
    ]


def _checked(source: Source, name: str, shape: tuple[int, ...]) -> Stored:
    """A matrix whose bytes are really there: the compiled code reads without looking."""
    stored = source.stored(name)
    if stored.shape != shape or stored.data.size != stored.type.byte_size(shape):
        raise FormatError(
            f"The weight '{name}' has the shape {stored.shape} in {stored.data.size:,} bytes of {stored.type.name}, "
            f"but the model needs {shape}.",
            "The file is damaged, or of another model.",
        )
    return stored


def _write(path: Path, key: str, stored: Sequence[Stored], sizes: Sequence[int], threads: int) -> bool:
    """Lay matrices out into a file, one at a time; False where the folder or the disk does not let it."""
    header = json.dumps({"key": key}).encode()
    try:
        with atomic_write(path) as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            file.write(b"\0" * (_padded(len(header) + 16) - len(header) - 16))
            for one, size in zip(stored, sizes):
                packed = pack(one, threads=threads)
                for part in (packed.values, packed.scales, packed.minima):
                    file.write(part.data)
                file.write(b"\0" * (size - packed.nbytes))
    except (FileError, OSError):
        return False
    return True


def _key(source: Source, names: Sequence[str]) -> str:
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    return sha256_json(
        {"version": _VERSION, "files": files, "names": list(names), "config": repr(source.config)}
    )


def _open(path: Path, key: str, rows: Sequence[_Row]) -> list[Packed] | None:
    """What a file keeps, mapped; None if it is of other weights, of another version, or cut off."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            length = int.from_bytes(start[8:], "little")
            if start[:8] != _MAGIC or length > 1 << 16 or json.loads(file.read(length)) != {"key": key}:
                return None
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError):
        return None
    found, place = [], _padded(length + 16)
    for row in rows:
        if place + sum(row.sizes) > data.size:
            return None
        parts = np.split(data[place : place + sum(row.sizes)], np.cumsum(row.sizes)[:2])
        found.append(Packed(row.type, row.rows, row.columns, *parts))
        place += _padded(sum(row.sizes))
    return found


def _padded(size: int) -> int:
    return -(-size // _LINE) * _LINE


def _huge(size: int) -> np.ndarray:
    """Zeros on pages of 2 MiB where the system has them."""
    data = mmap.mmap(-1, max(size, 1) + (2 << 20))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        data.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(data, np.uint8)[:size]
