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

import numpy as np

from lexmill.errors import FileError
from lexmill.files import atomic_write, sha256_json
from lexmill.formats.blocks import BLOCK_TYPES, decode
from lexmill.inference.native.library import MatrixStruct, library
from lexmill.inference.native.sources import Source, Stored

FLOAT32, FLOAT16, BFLOAT16, EIGHT_BITS, FOUR_BITS = range(5)
NAMES = ("float32", "float16", "bfloat16", "8 bits", "4 bits")
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

    def struct(self) -> MatrixStruct:
        """For the compiled code; valid as long as this is."""
        addresses = [
            part.ctypes.data if part.size else None for part in (self.values, self.scales, self.minima)
        ]
        return MatrixStruct(self.type, self.rows, self.columns, *addresses)


def _sizes(type: int, least: bool, rows: int, columns: int) -> tuple[int, int, int]:
    """Bytes of values, scales and minima."""
    blocks = 2 * -(-rows // 32) * -(-columns // 32)
    scales = blocks * 32 if type >= EIGHT_BITS else 0
    return blocks * _BYTES_A_BLOCK[type], scales, scales if least else 0


def _plan_of(stored: Stored) -> tuple[int, bool]:
    return _BECOMES.get(stored.type.name, (EIGHT_BITS, False))


def pack(stored: Stored, room: np.ndarray | None = None, threads: int = 1) -> Packed:
    """Lay a matrix out.

    Args:
        room: flat uint8, zeros, of the right size; made where not given.
    """
    type, least = _plan_of(stored)
    rows, columns = stored.shape
    sizes = _sizes(type, least, rows, columns)
    if room is None:
        room = np.zeros(sum(sizes), np.uint8)
    data, source, order = stored.data, stored.type.id, stored.order
    if stored.type.name not in _BECOMES:
        numbers = decode(data, stored.type, stored.shape)
        data, source = (
            np.ascontiguousarray(numbers, np.float32).reshape(-1).view(np.uint8),
            BLOCK_TYPES["F32"].id,
        )
    values, scales, minima = np.split(room, np.cumsum(sizes)[:2])
    packed = Packed(type, rows, columns, values, scales, minima)
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
    found = _open(source.packed, key)
    if found is not None:
        return found
    stored = [source.stored(name) for name in names]
    rows = [(*_plan_of(one), *one.shape) for one in stored]
    sizes = [_padded(sum(_sizes(*row))) for row in rows]
    header = json.dumps({"key": key, "matrices": rows}).encode()
    start = _padded(len(header) + 16)
    if keep:
        try:
            with atomic_write(source.packed) as file:
                file.write(b"LEXPACK1" + len(header).to_bytes(8, "little") + header)
                file.write(b"\0" * (start - len(header) - 16))
                for one, size in zip(stored, sizes):
                    packed = pack(one, threads=threads)
                    parts = [part.tobytes() for part in (packed.values, packed.scales, packed.minima)]
                    whole = b"".join(parts)
                    file.write(whole + b"\0" * (size - len(whole)))
        except (FileError, OSError):
            keep = False  # a folder that cannot be written to, or a full disk
    if keep:
        found = _open(source.packed, key)
        if found is not None:
            return found
    room = _huge(sum(sizes))
    places = np.cumsum([0, *sizes])
    return [
        pack(one, room[place : place + sum(_sizes(*row))], threads)
        for one, row, place in zip(stored, rows, places)
    ]


def _key(source: Source, names: Sequence[str]) -> str:
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    return sha256_json(
        {"version": _VERSION, "files": files, "names": list(names), "config": repr(source.config)}
    )


def _open(path: Path, key: str) -> list[Packed] | None:
    """What a file keeps, mapped; None if it is of other weights, of another version, or damaged."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            length = int.from_bytes(start[8:], "little")
            if start[:8] != b"LEXPACK1" or length > 1 << 24:
                return None
            header = json.loads(file.read(length))
            if header["key"] != key:
                return None
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found, place = [], _padded(length + 16)
    for row in header["matrices"]:
        sizes = _sizes(*row)
        if place + sum(sizes) > data.size:
            return None
        parts = np.split(data[place : place + sum(sizes)], np.cumsum(sizes)[:2])
        found.append(Packed(row[0], row[2], row[3], *parts))
        place += _padded(sum(sizes))
    return found


def _padded(size: int) -> int:
    return -(-size // _LINE) * _LINE


def _huge(size: int) -> np.ndarray:
    """Zeros on pages of 2 MiB where the system has them."""
    data = mmap.mmap(-1, max(size, 1) + (2 << 20))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        data.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(data, np.uint8)[:size]
