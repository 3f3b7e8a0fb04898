"""Token shards: documents as flat arrays of token ids on disk that NumPy maps without reading them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.data.folders import refuse_foreign_folder
from lexmill.errors import DataError, FileError, FormatError
from lexmill.files import atomic_directory, explain_os_errors, read_json, write_json

FORMAT = "lexmill-tokens"
VERSION = 1
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET = np.dtype("<i8")
FILES = ("tokens.bin", "offsets.bin", "header.json")
MAKE_AGAIN = "Make the token shard again from its documents."


@dataclass(frozen=True, eq=False)
class TokenShard:
    """An open shard. `shard[i]` is document i as a read-only view of shape (its tokens,).

    Args:
        folder: where it lies.
        header: what `header.json` says.
        ids: all token ids, shape (tokens,), mapped.
        offsets: where documents begin in `ids`, shape (documents + 1,), mapped.
    """

    folder: Path
    header: dict[str, Any]
    ids: np.ndarray
    offsets: np.ndarray

    @classmethod
    def open(cls, folder: Path | str) -> TokenShard:
        """Map a shard after checking its header against its files.

        Raises:
            FileError: there is no such folder.
            FormatError: a file is missing, cut off, or contradicts the header.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileError(
                f"{folder}: there is no such token shard (a folder).", "Check the spelling of the path."
            )
        for name in FILES:
            if not (folder / name).is_file():
                raise FormatError(f"{folder}: this token shard has no {name}.", MAKE_AGAIN)
        header = _checked_header(folder / "header.json")
        ids = _map(folder / "tokens.bin", DTYPES[header["dtype"]], header["tokens"], "tokens")
        offsets = _map(folder / "offsets.bin", OFFSET, header["documents"] + 1, "offsets")
        if offsets[0] != 0 or offsets[-1] != header["tokens"]:
            raise FormatError(
                f"{folder / 'offsets.bin'}: offsets run from {offsets[0]:,} to {offsets[-1]:,}, not from 0 "
                f"to the {header['tokens']:,} tokens that the header states.",
                MAKE_AGAIN,
            )
        backwards = np.flatnonzero(offsets[1:] < offsets[:-1])
        if backwards.size:
            raise FormatError(
                f"{folder / 'offsets.bin'}: document {backwards[0] + 1:,} ends before it begins.", MAKE_AGAIN
            )
        return cls(folder, header, ids, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def tokens(self) -> int:
        """How many tokens all documents have together."""
        return self.header["tokens"]

    @property
    def bytes(self) -> int:
        """How many UTF-8 bytes the text of all documents has: the base of bits per byte."""
        return self.header["bytes"]

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary; every id is below it."""
        return self.header["vocab_size"]

    @property
    def tokenizer_sha256(self) -> str:
        """The hash of the tokenizer that made the ids."""
        return self.header["tokenizer_sha256"]

    def check_ids(self) -> None:
        """Read all ids and compare them with the vocabulary; `open` does not, to stay instant.

        Raises:
            FormatError: an id is not below `vocab_size`; names its document.
        """
        block = 1 << 22
        for start in range(0, self.tokens, block):
            bad = np.flatnonzero(self.ids[start : start + block] >= self.vocab_size)
            if bad.size:
                place = start + int(bad[0])
                document = int(np.searchsorted(self.offsets, place, side="right"))
                raise FormatError(
                    f"{self.folder / 'tokens.bin'}, document {document:,}: id {self.ids[place]:,} is not below "
                    f"the vocabulary size {self.vocab_size:,}.",
                    MAKE_AGAIN,
                )


def _checked_header(path: Path) -> dict[str, Any]:
    header = read_json(path, "token shard header")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise FormatError(f'{path}: "format" is not "{FORMAT}"; this is no token shard.', MAKE_AGAIN)
    if header.get("version") != VERSION:
        raise FormatError(
            f"{path}: version {header.get('version')!r} is not {VERSION}, the one this lexmill reads.",
            MAKE_AGAIN,
        )
    if header.get("dtype") not in tuple(DTYPES):
        raise FormatError(
            f'{path}: "dtype" is {header.get("dtype")!r}, not "uint16" or "uint32".', MAKE_AGAIN
        )
    for key in ("tokens", "documents", "vocab_size", "bytes"):
        value = header.get(key)
        if type(value) is not int or not 0 <= value < 1 << 62:
            raise FormatError(f'{path}: "{key}" is {value!r}, not a count.', MAKE_AGAIN)
    if not isinstance(header.get("tokenizer_sha256"), str):
        raise FormatError(f'{path}: "tokenizer_sha256" is missing.', MAKE_AGAIN)
    return header


def _map(path: Path, dtype: np.dtype, count: int, what: str) -> np.ndarray:
    with explain_os_errors(path, "read"):
        size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise FormatError(
            f"{path}: the file has {size:,} bytes, but {count:,} {what} need {count * dtype.itemsize:,}. It is cut "
            "off or belongs to another header.",
            MAKE_AGAIN,
        )
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    with explain_os_errors(path, "read"):
        return np.memmap(path, dtype, mode="r", shape=(count,))


def write_token_shard(
    folder: Path | str,
    documents: Iterable[tuple[Sequence[int] | np.ndarray, int]],
    *,
    vocab_size: int,
    tokenizer_sha256: str,
    created_from: str = "",
) -> TokenShard:
    """Write a shard as a stream; the folder appears when all of it is on disk.

    Args:
        folder: the final name; an older shard there is replaced.
        documents: for each document its token ids, and the bytes of its text in UTF-8.
        vocab_size: ids are below it; up to 65,536 they are stored as uint16, else as uint32.
        tokenizer_sha256: the hash of the tokenizer that made the ids.
        created_from: what the documents were, for people (no paths of this machine).

    Returns:
        The shard, open.

    Raises:
        DataError: ids that are not integers or not in the vocabulary; names the document.
        FileError: no space, no permission, or something in the way.
    """
    folder = Path(folder)
    refuse_foreign_folder(folder, FILES)
    name = "uint16" if vocab_size <= 1 << 16 else "uint32"
    offsets = array("q", [0])
    text_bytes = 0
    with atomic_directory(folder) as partial:
        with open(partial / "tokens.bin", "wb") as file:
            for number, (ids, size) in enumerate(documents, 1):
                checked = _checked_ids(ids, vocab_size, number)
                file.write(checked.astype(DTYPES[name]).tobytes())
                offsets.append(offsets[-1] + len(checked))
                text_bytes += int(size)
            _to_disk(file)
        with open(partial / "offsets.bin", "wb") as file:
            file.write(np.asarray(offsets, OFFSET).tobytes())
            _to_disk(file)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": name,
            "tokens": offsets[-1],
            "documents": len(offsets) - 1,
            "bytes": text_bytes,
            "vocab_size": vocab_size,
            "tokenizer_sha256": tokenizer_sha256,
            "created_from": created_from,
        }
        write_json(partial / "header.json", header)
    return TokenShard.open(folder)


def _checked_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, number: int) -> np.ndarray:
    try:
        checked = np.asarray(ids) if len(ids) else np.empty(0, np.int64)
    except OverflowError:
        checked = np.empty(0, object)
    if checked.ndim != 1 or checked.dtype.kind not in "iu":
        raise DataError(
            f"Document {number:,}: its token ids are not a flat list of integers (found {checked.dtype}, "
            f"{checked.ndim} dimensions)."
        )
    if checked.size and not (checked.min() >= 0 and checked.max() < vocab_size):
        bad = checked[(checked < 0) | (checked >= vocab_size)][0]
        raise DataError(
            f"Document {number:,}: token id {bad:,} is outside the vocabulary of {vocab_size:,}.",
            "Encode the documents with the tokenizer whose size and hash you give.",
        )
    return checked


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
