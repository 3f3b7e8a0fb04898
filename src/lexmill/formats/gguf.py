"""The GGUF container: typed metadata and named tensors, written as a stream and read through a map.

Nothing here knows what the keys mean, and the reader trusts nothing: each count and length is
checked against the bytes that are left before it is used. Specification: ggml, docs/gguf.md; where
llama.cpp's reader (ggml/src/gguf.cpp) is stricter, so are we.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lexmill.errors import FormatError
from lexmill.files import atomic_write, explain_os_errors, require_file, require_space
from lexmill.formats.blocks import BlockType, block_type, decode

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 63  # llama.cpp keeps names in 64 bytes with a NUL
MAX_AXES = 4
MAX_STRING_BYTES = 1 << 30
MAX_ARRAY_ITEMS = 1 << 30
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class _Scalar(NamedTuple):
    code: int
    dtype: np.dtype[Any]


_SCALARS = {
    "u8": _Scalar(0, np.dtype("u1")),
    "i8": _Scalar(1, np.dtype("i1")),
    "u16": _Scalar(2, np.dtype("<u2")),
    "i16": _Scalar(3, np.dtype("<i2")),
    "u32": _Scalar(4, np.dtype("<u4")),
    "i32": _Scalar(5, np.dtype("<i4")),
    "f32": _Scalar(6, np.dtype("<f4")),
    "bool": _Scalar(7, np.dtype("u1")),
    "u64": _Scalar(10, np.dtype("<u8")),
    "i64": _Scalar(11, np.dtype("<i8")),
    "f64": _Scalar(12, np.dtype("<f8")),
}
_STRING_CODE, _ARRAY_CODE = 8, 9
_SCALAR_NAMES = {scalar.code: name for name, scalar in _SCALARS.items()}


@dataclass(frozen=True)
class Value:
    """One typed metadata value: `type` as in "u32" or "string"; `items` marks an array of that type."""

    type: str
    value: Any
    items: bool = False


def u32(value: int) -> Value:
    """A count or an id."""
    return Value("u32", value)


def f32(value: float) -> Value:
    """A real number."""
    return Value("f32", value)


def boolean(value: bool) -> Value:
    """A flag."""
    return Value("bool", value)


def string(value: str) -> Value:
    """A text."""
    return Value("string", value)


def array(type: str, values: Sequence[Any]) -> Value:
    """A list whose items all have the one type."""
    return Value(type, values, items=True)


class TensorToWrite(NamedTuple):
    """A tensor that does not exist yet: `produce` makes its bytes when their turn comes."""

    name: str
    shape: tuple[int, ...]  # in torch's order: rows first
    type: BlockType
    produce: Callable[[], Any]  # of anything with a buffer of exactly type.byte_size(shape) bytes


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, Value],
    tensors: Iterable[TensorToWrite | tuple[str, tuple[int, ...], BlockType, Callable[[], Any]]],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Write a GGUF file, version 3, atomically; one tensor at a time is in memory.

    Raises:
        FormatError: a key, a value or a tensor that the format cannot hold; says which.
        FileError: no space, no permission.
    """
    path = Path(path)
    rows = [TensorToWrite(*row) for row in tensors]
    if alignment < 8 or alignment & (alignment - 1):
        raise FormatError(f"{path}: the alignment {alignment} is not a power of two from 8.")
    metadata = dict(metadata)
    if alignment != DEFAULT_ALIGNMENT:
        metadata["general.alignment"] = u32(alignment)
    head = bytearray(MAGIC + struct.pack("<Iqq", VERSION, len(rows), len(metadata)))
    for key, value in metadata.items():
        if not _KEY.fullmatch(key) or len(key) > 65535:
            raise FormatError(
                f"{path}: {key[:100]!r} is not a metadata key.", "Keys are like 'llama.block_count'."
            )
        head += _string_bytes(key)
        head += _value_bytes(value, f"{path}: metadata '{key}'")
    offset = 0
    for row in rows:
        _check_tensor(row, f"{path}: tensor '{row.name}'")
        head += _string_bytes(row.name) + struct.pack("<I", len(row.shape))
        head += struct.pack(f"<{len(row.shape)}q", *reversed(row.shape)) + struct.pack(
            "<iQ", row.type.id, offset
        )
        offset += _padded(row.type.byte_size(row.shape), alignment)
    if len({row.name for row in rows}) != len(rows):
        raise FormatError(f"{path}: two tensors have the same name.")
    head += bytes(-len(head) % alignment)
    require_space(path.parent, len(head) + offset, f"The file {path.name}")
    with atomic_write(path) as file:
        file.write(head)
        for row in rows:
            data = memoryview(row.produce()).cast("B")
            size = row.type.byte_size(row.shape)
            if data.nbytes != size:
                raise FormatError(
                    f"{path}: tensor '{row.name}' has {data.nbytes:,} bytes instead of {size:,}."
                )
            file.write(data)
            file.write(bytes(_padded(size, alignment) - size))


def _padded(size: int, alignment: int) -> int:
    return size + -size % alignment


def _check_tensor(row: TensorToWrite, where: str) -> None:
    if not 0 < len(row.name.encode("utf-8")) <= MAX_NAME_BYTES:
        raise FormatError(f"{where}: a name has 1 to {MAX_NAME_BYTES} bytes.")
    if not 1 <= len(row.shape) <= MAX_AXES or any(axis < 1 for axis in row.shape):
        raise FormatError(f"{where}: the shape {row.shape} does not have 1 to {MAX_AXES} positive sizes.")
    if not row.type.fits(row.shape):
        raise FormatError(
            f"{where}: rows of {row.shape[-1]} weights do not divide into {row.type.name} blocks of "
            f"{row.type.block_size}."
        )


def _string_bytes(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value_bytes(value: Value, where: str) -> bytes:
    items = list(value.value) if value.items else [value.value]
    try:
        if value.type == "string":
            code, data = _STRING_CODE, b"".join(_string_bytes(item) for item in items)
        else:
            code, dtype = _SCALARS[value.type]
            if dtype.kind in "iu":
                low, high = (0, 1) if value.type == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
                if not all(int(item) == item and low <= item <= high for item in items):
                    raise ValueError("out of range")
            data = np.array(items, dtype).tobytes()
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(
            f"{where}: {str(value.value)[:60]!r} cannot be written as {value.type} ({error})."
        ) from error
    if value.items:
        return struct.pack("<IIQ", _ARRAY_CODE, code, len(items)) + data
    return struct.pack("<I", code) + data


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in a file. `shape` is in torch's order, `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    size: int


class GGUFFile:
    """A GGUF file, mapped into memory.

    Attributes:
        path: where it lies.
        version: 2 or 3.
        alignment: of the tensors, in bytes.
        metadata: key to value: int, float, bool, str, a list of str or bool, or a NumPy array of numbers.
        types: key to the type's name, "array of" included.
        tensors: name to place, in file order.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self._data = path, data
        cursor = _Cursor(path, data)
        self.version, tensor_count, key_count = _read_start(cursor)
        self.metadata: dict[str, Any] = {}
        self.types: dict[str, str] = {}
        for number in range(key_count):
            key = cursor.string(f"metadata key {number}")
            if not key or key in self.metadata:
                raise cursor.error(f"metadata key {number} ({key[:60]!r}) is empty or there twice")
            self.types[key], self.metadata[key] = _read_value(cursor, f"metadata '{key[:60]}'")
        self.alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if "general.alignment" in self.types and (
            self.types["general.alignment"] != "u32"
            or self.alignment < 1
            or self.alignment & (self.alignment - 1)
        ):
            raise cursor.error(f"the alignment {str(self.alignment)[:60]} is not a power of two of type u32")
        self.tensors = _read_tensors(cursor, tensor_count, self.alignment)

    @classmethod
    def open(cls, path: Path | str) -> GGUFFile:
        """Map a file and check all of its structure.

        Raises:
            FileError: it cannot be opened.
            FormatError: it is damaged, hostile, or of a version that is not known; says what and where.
        """
        path = require_file(path, "GGUF file")
        with explain_os_errors(path, "read"), open(path, "rb") as file:
            if path.stat().st_size < 24:
                raise FormatError(
                    f"{path} has only {path.stat().st_size} bytes; it is cut off.", "Copy it again."
                )
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return cls(path, data)
        except BaseException:
            with contextlib.suppress(BufferError):
                data.close()
            raise

    def close(self) -> None:
        """Let go of the file. Arrays that were given out stay valid."""
        with contextlib.suppress(BufferError):
            self._data.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor as a read-only view (flat uint8).

        Raises:
            FormatError: there is no tensor of that name.
        """
        if name not in self.tensors:
            raise FormatError(f"{self.path} has no tensor '{name}'.", "Is it the file of another model?")
        info = self.tensors[name]
        return np.frombuffer(self._data, np.uint8, info.size, info.offset)

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32, in torch's order of axes.

        Raises:
            FormatError: there is no tensor of that name, or its type cannot be read yet.
        """
        data, info = self.raw(name), self.tensors[name]
        try:
            return decode(data, info.type, info.shape)
        except FormatError as error:
            raise FormatError(f"{self.path}: tensor '{name}': {error.message}", error.hint) from error


class _Cursor:
    """Reads on from a position, and refuses whatever is not there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def error(self, what: str) -> FormatError:
        return FormatError(
            f"{self.path}: {what} (near byte {self.position:,}).",
            "The file is damaged; make or copy it again.",
        )

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes; gives where they begin."""
        if size > self.left:
            raise self.error(f"{what} needs {size:,} bytes, but {self.left:,} are left")
        start = self.position
        self.position += size
        return start

    def number(self, form: str, what: str) -> Any:
        start = self.take(struct.calcsize("<" + form), what)
        return struct.unpack_from("<" + form, self.data, start)[0]

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        if length > MAX_STRING_BYTES:
            raise self.error(f"{what} claims {length:,} bytes")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not valid UTF-8") from error


def _read_start(cursor: _Cursor) -> tuple[int, int, int]:
    if cursor.data[:4] != MAGIC:
        raise FormatError(f"{cursor.path} is not a GGUF file: it does not begin with 'GGUF'.")
    cursor.position = 4
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0:
        raise cursor.error(f"the version {version:#x} looks like a file for big-endian machines")
    if version not in (2, 3):
        raise cursor.error(f"GGUF version {version} is not supported, only 2 and 3")
    tensors, keys = cursor.number("q", "the tensor count"), cursor.number("q", "the key count")
    # the smallest key takes 13 bytes (empty text, type, one byte), the smallest tensor 24
    if not 0 <= tensors <= cursor.left // 24 or not 0 <= keys <= cursor.left // 13:
        raise cursor.error(f"{tensors:,} tensors and {keys:,} keys cannot be in {cursor.left:,} bytes")
    return version, tensors, keys


def _read_value(cursor: _Cursor, where: str) -> tuple[str, Any]:
    code = cursor.number("I", where)
    if code == _STRING_CODE:
        return "string", cursor.string(where)
    if code in _SCALAR_NAMES:
        name = _SCALAR_NAMES[code]
        return name, _read_numbers(cursor, name, 1, where).tolist()[0]
    if code != _ARRAY_CODE:
        raise cursor.error(f"{where} has the unknown type {code}")
    item = cursor.number("I", where)
    count = cursor.number("Q", where)
    if count > MAX_ARRAY_ITEMS:
        raise cursor.error(f"{where} claims {count:,} items")
    if item == _STRING_CODE:
        if count * 8 > cursor.left:
            raise cursor.error(f"{where} claims {count:,} strings in {cursor.left:,} bytes")
        return "array of string", _read_strings(cursor, count, where)
    if item not in _SCALAR_NAMES:
        raise cursor.error(f"{where} is an array of arrays or of the unknown type {item}")
    name = _SCALAR_NAMES[item]
    values = _read_numbers(cursor, name, count, where)
    return f"array of {name}", values.tolist() if name == "bool" else values


def _read_strings(cursor: _Cursor, count: int, where: str) -> list[str]:
    """A vocabulary has a hundred thousand of them: the same as `cursor.string`, without a call for each."""
    data, at, end, found = cursor.data, cursor.position, len(cursor.data), list[str]()
    length_at = struct.Struct("<Q").unpack_from
    for _ in range(count):
        start = at + 8
        length = length_at(data, at)[0] if start <= end else MAX_STRING_BYTES + 1
        try:
            if length > MAX_STRING_BYTES or length > end - start:
                raise ValueError
            found.append(str(data[start : start + length], "utf-8"))
        except ValueError:
            cursor.position = at
            cursor.string(where)  # says what is wrong
            raise
        at = start + length
    cursor.position = at
    return found


def _read_numbers(cursor: _Cursor, name: str, count: int, where: str) -> np.ndarray:
    dtype = _SCALARS[name].dtype
    start = cursor.take(count * dtype.itemsize, where)
    values = np.frombuffer(cursor.data, dtype, count, start)
    return values != 0 if name == "bool" else values.copy()


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    expected = 0  # each tensor begins where the one before it ends: no gaps, no overlap, no other order
    for number in range(count):
        name = cursor.string(f"the name of tensor {number}")
        where = f"tensor {number} ('{name[:MAX_NAME_BYTES]}')"
        if not name or len(name.encode("utf-8")) > MAX_NAME_BYTES or name in infos:
            raise cursor.error(
                f"{where}: the name is empty, longer than {MAX_NAME_BYTES} bytes, or there twice"
            )
        axes = cursor.number("I", where)
        if axes > MAX_AXES:
            raise cursor.error(f"{where} has {axes:,} axes")
        sizes = [cursor.number("q", where) for _ in range(axes)]
        if any(size < 0 for size in sizes) or math.prod(sizes) >= 1 << 63:
            raise cursor.error(f"{where} has the impossible sizes {sizes}")
        code, offset = cursor.number("i", where), cursor.number("Q", where)
        kind = block_type(code)
        if kind is None:
            raise cursor.error(f"{where} has the unknown type {code}")
        shape = tuple(reversed(sizes))
        if not kind.fits(shape):
            row = shape[-1] if shape else 1
            raise cursor.error(f"{where}: rows of {row} weights do not divide into {kind.name} blocks")
        if offset != expected:
            raise cursor.error(f"{where} begins at {offset:,} instead of {expected:,}")
        size = kind.byte_size(shape)
        infos[name] = TensorInfo(name, shape, kind, offset, size)
        expected += _padded(size, alignment)
    start = _padded(cursor.position, alignment)
    for info in infos.values():
        if start + info.offset + info.size > len(cursor.data):
            raise cursor.error(f"tensor '{info.name}' reaches past the end of the file; it is cut off")
    return {
        info.name: TensorInfo(info.name, info.shape, info.type, start + info.offset, info.size)
        for info in infos.values()
    }
