"""Bytes of raw files to text: byte-order marks, UTF-8 with a place for what is not, and binary files refused."""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lexmill.errors import DataError
from lexmill.files import explain_os_errors, require_file

_HEAD = 1 << 16
_MAGIC = {
    b"PK\x03\x04": "a ZIP archive (or an Office or EPUB document)",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"%PDF-": "a PDF document",
    b"\x1f\x8b": "a gzip archive",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"PAR1": "a Parquet file",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x7fELF": "a program",
    b"GGUF": "a GGUF model",
    b"RIFF": "a sound or video file",
    b"OggS": "an Ogg sound file",
}
_TEXT_CONTROLS = frozenset(b"\t\n\r\f\x1b")
_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_UTF32 = {codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE}


# How files of rows may be compressed. What they unpack to is read as it comes, line by line, and bounded.
_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
_LONGEST_LINE = 1 << 28  # bytes
_MOST_TIMES_LARGER = 2000  # a text shrinks to a tenth or so; what unpacks to more is no text
_ALWAYS_FINE = 1 << 26  # bytes


def raw_suffix(path: Path) -> str:
    """The suffix that tells how to read a file, without that of its compression: ".csv" of "a.csv.xz"."""
    if path.suffix.lower() in _COMPRESSED and Path(path.stem).suffix.lower() in _ROWS:
        return Path(path.stem).suffix.lower()
    return path.suffix.lower()


_ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


def read_bytes(path: Path) -> bytes:
    """All bytes of a raw file.

    Raises:
        FileError: it cannot be opened.
        DataError: it is empty, or holds no text.
    """
    require_file(path, "raw file")
    with explain_os_errors(path, "read"):
        raw = path.read_bytes()
    _refuse_binary(path, raw[:_HEAD])
    return raw


def decode(path: Path, raw: bytes) -> str:
    """Text of raw bytes: UTF-8 with or without a byte-order mark, or UTF-16 with one.

    Raises:
        DataError: it is not; says line and byte.
    """
    for mark, encoding in _UTF16.items():
        if raw.startswith(mark):
            try:
                return raw[len(mark) :].decode(encoding)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: invalid UTF-16 at byte {error.start + 2:,}; the file may be cut off.",
                    "Copy it again from its source.",
                ) from error
    start = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    try:
        return raw[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        raise _not_utf8(path, raw.count(b"\n", 0, offset) + 1, offset, raw[offset]) from error


def read_text(path: Path) -> str:
    """The whole text of a file.

    Raises:
        FileError: it cannot be opened.
        DataError: it is empty, only white space, binary, or not UTF-8.
    """
    text = decode(path, read_bytes(path))
    if not text.strip():
        raise DataError(f"{path}: this file holds only white space.", "Remove it, or put text into it.")
    return text


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file with their line ends, without holding the file in memory (UTF-16 excepted).

    Raises:
        FileError: it cannot be opened.
        DataError: it is empty, binary, or a line is not UTF-8.
    """
    require_file(path, "raw file")
    packed = _COMPRESSED.get(path.suffix.lower())
    with explain_os_errors(path, "read"), (packed or open)(path, "rb") as file:
        try:
            yield from _lines(path, file, packed is not None)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DataError(
                f"{path}: it cannot be unpacked ({error}).", "It may be cut off; copy it again."
            ) from error


def _lines(path: Path, file: IO[bytes], packed: bool) -> Iterator[str]:
    head = file.read(_HEAD)
    _refuse_binary(path, head)
    file.seek(0)
    if head[:2] in _UTF16 and not packed:
        yield from io.StringIO(decode(path, file.read()), newline="\n")
        return
    most = max(_ALWAYS_FINE, _MOST_TIMES_LARGER * path.stat().st_size)
    offset = 0
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
        endless = len(line) == _LONGEST_LINE and not line.endswith(b"\n")
        if endless or (packed and offset > most):
            raise DataError(
                f"{path}, line {number:,}: a line of {_LONGEST_LINE:,} bytes or more, or a file that unpacks to "
                f"over {_MOST_TIMES_LARGER:,} times its size, is not plausible.",
                "Is it the file that you meant?",
            )
        start = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
        try:
            yield line[start:].decode("utf-8")
        except UnicodeDecodeError as error:
            place = start + error.start
            raise _not_utf8(path, number, offset + place, line[place]) from error
        offset += len(line)


def _refuse_binary(path: Path, head: bytes) -> None:
    if not head:
        raise DataError(f"{path}: this file is empty.", "Remove it, or put text into it.")
    if head[:2] in _UTF16 and head[:4] not in _UTF32:
        return
    looks = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")
    controls = sum(byte < 32 and byte not in _TEXT_CONTROLS for byte in head)
    # Files that begin with "RIFF" or "BZh" in plain words exist, so printable magic alone is no proof.
    if b"\0" in head or controls * 20 > len(head) or head.startswith(b"%PDF-"):
        raise DataError(
            f"{path}: this is a binary file, not text" + (f"; it looks like {looks}." if looks else "."),
            "Unpack it or convert it to text first, or leave it out.",
        )
    if looks and any(byte >= 0x80 for byte in head):
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
        except UnicodeDecodeError:
            raise DataError(
                f"{path}: this is a binary file, not text; it looks like {looks}.",
                "Unpack it or convert it to text first, or leave it out.",
            ) from None


def _not_utf8(path: Path, line: int, offset: int, byte: int) -> DataError:
    return DataError(
        f"{path}, line {line:,}: invalid UTF-8 (byte 0x{byte:02x} at offset {offset:,} of the file).",
        f'If the file is in Latin-1, convert it: iconv -f LATIN1 -t UTF-8 "{path.name}" > converted{path.suffix}',
    )
