"""The types that weights have in GGUF files: their sizes, and float32 to and from the ones that we write.

A quantised type stores a row in blocks of a fixed number of weights; a type without blocks is one
with blocks of one weight. The layouts are those of ggml (ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lexmill.config import suggest
from lexmill.errors import ConfigError, FormatError
from lexmill.formats.safetensors import from_bfloat16, to_bfloat16

_CHUNK = 1 << 20  # weights that are encoded at once, so that temporary arrays stay small


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


def encode(array: np.ndarray, kind: BlockType) -> np.ndarray:
    """Convert weights to the bytes of a type.

    Args:
        array: any shape whose last axis divides into blocks.
        kind: one of `ENCODERS`.

    Returns:
        The bytes as a flat uint8 array, rows after each other.

    Raises:
        ConfigError: there is no encoder for that type.
        FormatError: rows that do not divide into blocks, or a weight that the type cannot hold.
    """
    if kind.name not in ENCODERS:
        raise ConfigError(f"Weights cannot be written as {kind.name} yet.", suggest(kind.name, ENCODERS))
    if not kind.fits(array.shape):
        raise FormatError(
            f"Rows of {array.shape[-1]} weights do not divide into {kind.name} blocks of {kind.block_size}."
        )
    flat = np.ascontiguousarray(array, np.float32).reshape(-1)
    result = np.empty(kind.byte_size(array.shape), np.uint8)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if not np.isfinite(part).all():
            raise FormatError(
                "A weight is infinite or not a number.", "The training diverged; use an earlier checkpoint."
            )
        first = start // kind.block_size * kind.block_bytes
        encoded = ENCODERS[kind.name](part)
        result[first : first + encoded.size] = encoded
    return result


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
    return DECODERS[kind.name](data).reshape(shape)


def _encode_f16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    _refuse_overflow(half, values, "F16")
    return half.view(np.uint8)


def _encode_bf16(values: np.ndarray) -> np.ndarray:
    bits = to_bfloat16(values)
    _refuse_overflow(from_bfloat16(bits), values, "BF16")
    return bits.astype("<u2").view(np.uint8)


def _refuse_overflow(stored: np.ndarray, values: np.ndarray, name: str) -> None:
    infinite = ~np.isfinite(stored)
    if infinite.any():
        raise FormatError(
            f"The weight {values[infinite.argmax()]:.6g} is too large for {name}.",
            "Choose the type f32 instead.",
        )


def _encode_q8_0(values: np.ndarray) -> np.ndarray:
    """As ggml's quantize_row_q8_0_ref, byte for byte: float32 throughout, halves away from zero."""
    blocks = values.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
        half = scale.astype("<f2")
    _refuse_overflow(half[:, 0], blocks[:, 0], "Q8_0")
    # A scale so small that its inverse is infinite is stored as zero: so are its weights.
    scaled = blocks * np.where(np.isfinite(inverse), inverse, np.float32(0))
    size = np.abs(scaled)
    whole = np.floor(size)
    rounded = np.copysign(whole + np.floor(2 * (size - whole)), scaled).astype(np.int8)
    return np.concatenate([half.view(np.uint8), rounded.view(np.uint8)], axis=1).reshape(-1)


def _decode_q8_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 34)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return blocks[:, 2:].view(np.int8).astype(np.float32) * scale


def _decode_q4_1(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 20)
    scale, least = np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float32).T
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return nibbles * scale[:, None] + least[:, None]


def _plain(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    def convert(data: np.ndarray) -> np.ndarray:
        return np.frombuffer(data, dtype).astype(np.float32)

    return convert


ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda values: values.astype("<f4").view(np.uint8),
    "F16": _encode_f16,
    "BF16": _encode_bf16,
    "Q8_0": _encode_q8_0,
}
DECODERS: dict[str, Callable[[np.ndarray], Any]] = {
    "F32": _plain("<f4"),
    "F16": _plain("<f2"),
    "BF16": lambda data: from_bfloat16(np.frombuffer(data, "<u2")),
    "Q8_0": _decode_q8_0,
    "Q4_1": _decode_q4_1,
}
