"""Reading SentencePiece model files (`spiece.model`, `tokenizer.model`): pieces, scores, and how text is prepared.

The file is one protobuf message; fields after `sentencepiece_model.proto` of google/sentencepiece.
Only what is needed to apply such a model is read. Every length is checked against the bytes left
before anything is taken.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lexmill.errors import FormatError
from lexmill.files import explain_os_errors, require_file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2

MAX_BYTES = 1 << 28
MAX_PIECES = 1 << 22
_HINT = "It may be cut off; copy it again."
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float = 0.0
    type: int = NORMAL


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What a SentencePiece file says.

    Attributes:
        pieces: the vocabulary in the order of ids.
        type: `UNIGRAM` or `BPE`.
        unk_id: the piece for what is unknown; bos_id and eos_id are -1 where there is none.
        charsmap: the compiled normalisation, as in tokenizer.json's `Precompiled`; b"" for none.
        dummy_prefix: a space is put before each text.
        merge_spaces: outer spaces are taken away, and runs of them become one.
    """

    pieces: tuple[Piece, ...]
    type: int
    byte_fallback: bool
    unk_id: int
    bos_id: int
    eos_id: int
    charsmap: bytes
    dummy_prefix: bool
    merge_spaces: bool


def read_sentencepiece(path: Path | str) -> SentencePieceModel:
    """Read a SentencePiece model file.

    Raises:
        FileError: it is missing.
        FormatError: it is damaged, or of a type other than unigram and BPE.
    """
    path = require_file(path, "SentencePiece model")
    with explain_os_errors(path, "read"):
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise FormatError(f"{path} has {size:,} bytes; more than 2^28 is not plausible.")
        return parse_sentencepiece(path.read_bytes(), str(path))


def parse_sentencepiece(data: bytes, where: str = "The SentencePiece model") -> SentencePieceModel:
    """`read_sentencepiece` for bytes at hand."""
    try:
        return _model(data, where)
    except _Damaged as error:
        raise FormatError(f"{where} is not a SentencePiece model: {error}.", _HINT) from error


class _Damaged(Exception):
    pass


def _model(data: bytes, where: str) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            if len(pieces) >= MAX_PIECES:
                raise FormatError(f"{where} has more than 2^22 pieces, which is not plausible.")
            pieces.append(_piece(_as_bytes(value), len(pieces)))
        elif number == 2:
            trainer |= dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer |= dict(_fields(_as_bytes(value)))
    if not pieces:
        raise _Damaged("it has no pieces")
    type = _signed(trainer.get(3, UNIGRAM))
    if type not in (UNIGRAM, BPE):
        raise FormatError(
            f"{where} is of type {type}; only unigram (1) and BPE (2) are supported.",
            "Convert it to a tokenizer.json with transformers and copy that file beside it.",
        )
    unk_id = _signed(trainer.get(40, 0))
    if not 0 <= unk_id < len(pieces):
        raise _Damaged(f"the id of the unknown piece is {unk_id}, of {len(pieces):,} pieces")
    return SentencePieceModel(
        pieces=tuple(pieces),
        type=type,
        byte_fallback=bool(trainer.get(35, 0)),
        unk_id=unk_id,
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
        charsmap=_as_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, 1)),
        merge_spaces=bool(normalizer.get(4, 1)),
    )


def _piece(data: bytes, number: int) -> Piece:
    fields = dict(_fields(data))
    try:
        text = _as_bytes(fields.get(1, b"")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Damaged(f"piece {number} is not valid UTF-8") from error
    score = fields.get(2, b"\0\0\0\0")
    if not isinstance(score, bytes) or len(score) != 4:
        raise _Damaged(f"the score of piece {number} is no 32-bit number")
    value = struct.unpack("<f", score)[0]
    if value != value:
        raise _Damaged(f"the score of piece {number} is not a number")
    return Piece(text=text, score=value, type=_signed(fields.get(3, NORMAL)))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message: varints as int, all else as bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == _VARINT:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        if wire == _BYTES:
            length, place = _varint(data, place)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise _Damaged(f"byte {place} begins no known kind of field")
        if length > len(data) - place:
            raise _Damaged(f"a field of {length:,} bytes stands where {len(data) - place:,} are left")
        yield tag >> 3, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise _Damaged("it ends inside a number")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, place
    raise _Damaged(f"a number at byte {place} does not end")


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise _Damaged("a number stands where a text is expected")
    return value


def _signed(value: int | bytes) -> int:
    """An int32 or enum: negative ones are written as 64-bit two's complement."""
    if isinstance(value, bytes):
        raise _Damaged("a text stands where a number is expected")
    return value - (1 << 64) if value >= 1 << 63 else value
