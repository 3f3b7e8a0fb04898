"""The types that weights have in GGUF files: their sizes, and float32 to and from those that can be converted.

A quantised type stores a row in blocks of a fixed number of weights; a type without blocks is one
with blocks of one weight. How blocks look is in `blocks32.py` and `k_quants.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lexmill.config import suggest
from lexmill.devices import threads
from lexmill.errors import ConfigError, FormatError
from lexmill.formats import blocks32, k_quants
from lexmill.formats.blocks32 import refuse_overflow
from lexmill.formats.safetensors import from_bfloat16, to_bfloat16

_CHUNK = 1 << 17  # weights that a thread encodes at once: what lies in a core's cache


@dataclass(frozen=True)
class BlockType:
    """One type of GGUF tensors: `block_size` weights lie in `block_bytes` bytes."""

    id: int
    name: str
    block_size: int
    block_bytes: int

    @property
    def quantised(self) -> bool:
        """Whether weights share a scale."""
        return self.block_size > 1

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the rows of a tensor of this shape (torch's order) divide into whole blocks."""
        return (shape[-1] if len(shape) else 1) % self.block_size == 0

    def byte_size(self, shape: Sequence[int]) -> int:
        """The bytes of a tensor of this shape. Exact at any size: Python's integers do not overflow."""
        return math.prod(shape) // self.block_size * self.block_bytes


# All that ggml knows, so that any file can be listed; `ENCODERS` and `DECODERS` say what can be converted.
BLOCK_TYPES: dict[str, BlockType] = {
    row[1]: BlockType(*row)
    for row in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
    )
}
_BY_ID = {kind.id: kind for kind in BLOCK_TYPES.values()}


def block_type(name_or_id: str | int) -> BlockType | None:
    """The type of that name ("Q8_0", in any case) or number; None when there is none."""
    return _BY_ID.get(name_or_id) if isinstance(name_or_id, int) else BLOCK_TYPES.get(name_or_id.upper())


def encode(array: np.ndarray, kind: BlockType, importance: np.ndarray | None = None) -> np.ndarray:
    """Convert weights to the bytes of a type, on as many threads as `devices.threads` says.

    Args:
        array: any shape whose last axis divides into blocks.
        kind: one of `ENCODERS`.
        importance: what an error in each column costs, (columns,), e.g. of an importance matrix. Types
            without a search (F32, F16, BF16, Q8_0) take no notice.

    Returns:
        The bytes as a flat uint8 array, rows after each other; the same on any number of threads.

    Raises:
        ConfigError: there is no encoder for that type.
        FormatError: rows that do not divide into blocks, a weight that the type cannot hold, or
            importance that does not fit.
    """
    if kind.name not in ENCODERS:
        raise ConfigError(f"Weights cannot be written as {kind.name} yet.", suggest(kind.name, ENCODERS))
    if not kind.fits(array.shape):
        raise FormatError(
            f"Rows of {array.shape[-1]} weights do not divide into {kind.name} blocks of {kind.block_size}."
        )
    rows = np.ascontiguousarray(array, np.float32).reshape(-1, array.shape[-1] if array.ndim else 1)
    if importance is not None:
        importance = _usable(importance, rows.shape[1])
    result = np.empty(kind.byte_size(array.shape), np.uint8)
    at_once = max(1, _CHUNK // max(rows.shape[1], 1))

    def encode_rows(start: int) -> None:
        part = rows[start : start + at_once]
        if not np.isfinite(part).all():
            raise FormatError(
                "A weight is infinite or not a number.", "The training diverged; use an earlier checkpoint."
            )
        first = start * rows.shape[1] // kind.block_size * kind.block_bytes
        encoded = ENCODERS[kind.name](part, importance).reshape(-1)
        result[first : first + encoded.size] = encoded

    starts = range(0, len(rows), at_once)
    if len(starts) < 2:
        for start in starts:
            encode_rows(start)
    else:
        with ThreadPoolExecutor(threads()) as pool:  # NumPy lets go of the interpreter while it computes
            list(pool.map(encode_rows, starts))
    return result


def _usable(importance: np.ndarray, columns: int) -> np.ndarray:
    """Importance as float32 whose mean is 1; a column that never met anything counts a little."""
    if importance.shape != (columns,):
        raise FormatError(
            f"Importance of {importance.size:,} columns does not fit rows of {columns:,} weights."
        )
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise FormatError("Importance is infinite, negative or not a number.", "Make the file again.")
    mean = float(importance.mean(dtype=np.float64))
    if mean == 0:
        return np.ones(columns, np.float32)
    return (importance / mean).astype(np.float32)


def decode(data: np.ndarray, kind: BlockType, shape: Sequence[int]) -> np.ndarray:
    """Convert the bytes of a tensor to float32.

    Args:
        data: flat uint8 array of exactly `kind.byte_size(shape)` bytes.
        kind: one of `DECODERS`.
        shape: in torch's order.

    Raises:
        FormatError: there is no decoder for that type, or the sizes disagree.
    """
    if kind.name not in DECODERS:
        raise FormatError(
            f"Tensors of type {kind.name} cannot be read yet.", f"Known are: {', '.join(DECODERS)}."
        )
    if data.size != kind.byte_size(shape) or not kind.fits(shape):
        raise FormatError(f"{data.size:,} bytes are no {kind.name} tensor of shape {tuple(shape)}.")
    return DECODERS[kind.name](data.reshape(-1)).reshape(shape)


def _encode_f32(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return values.astype("<f4").view(np.uint8)


def _encode_f16(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    refuse_overflow(half, values, "F16")
    return half.view(np.uint8)


def _encode_bf16(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    bits = to_bfloat16(values)
    refuse_overflow(from_bfloat16(bits), values, "BF16")
    return bits.astype("<u2").view(np.uint8)


def _plain(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    def convert(data: np.ndarray) -> np.ndarray:
        return np.frombuffer(data, dtype).astype(np.float32)

    return convert


# Each takes whole rows (rows, columns) and the importance of the columns, and gives bytes in any shape.
ENCODERS: dict[str, Callable[[np.ndarray, np.ndarray | None], np.ndarray]] = {
    "F32": _encode_f32,
    "F16": _encode_f16,
    "BF16": _encode_bf16,
    "Q8_0": blocks32.encode_q8_0,
    "Q4_0": blocks32.encode_q4_0,
    "Q4_1": blocks32.encode_q4_1,
    "Q5_0": blocks32.encode_q5_0,
    "Q5_1": blocks32.encode_q5_1,
    "Q4_K": k_quants.encode_q4_k,
    "Q5_K": k_quants.encode_q5_k,
    "Q6_K": k_quants.encode_q6_k,
}
# Each takes flat bytes and gives float32 in any shape.
DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _plain("<f4"),
    "F16": _plain("<f2"),
    "BF16": lambda data: from_bfloat16(np.frombuffer(data, "<u2")),
    "Q8_0": blocks32.decode_q8_0,
    "Q4_0": blocks32.decode_q4_0,
    "Q4_1": blocks32.decode_q4_1,
    "Q5_0": blocks32.decode_q5_0,
    "Q5_1": blocks32.decode_q5_1,
    "Q2_K": k_quants.decode_q2_k,
    "Q3_K": k_quants.decode_q3_k,
    "Q4_K": k_quants.decode_q4_k,
    "Q5_K": k_quants.decode_q5_k,
    "Q6_K": k_quants.decode_q6_k,
    "IQ4_NL": blocks32.decode_iq4_nl,
    "IQ4_XS": k_quants.decode_iq4_xs,
    "MXFP4": blocks32.decode_mxfp4,
}
