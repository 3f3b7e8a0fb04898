"""Types of GGUF tensors whose blocks hold 32 weights: float32 to their bytes and back.

Without importance each encoder gives the bytes of ggml's own reference (ggml-quants.c): float32
throughout, the scale kept in float32 until it is stored. With importance it searches for the scale.
Byte j of a block's four-bit part holds weight j in its low half and weight j + 16 in its high half.
"""

from __future__ import annotations

import numpy as np

from lexmill.errors import FormatError
from lexmill.formats.fitting import fit_offset, fit_scale

SIZE = 32
# The sixteen values of the types with a table (ggml-common.h: kvalues_iq4nl, kvalues_mxfp4).
NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The half-precision number at byte `start` of each block, as float32: (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def refuse_overflow(stored: np.ndarray, values: np.ndarray, name: str) -> None:
    """Complain of the first of `values` whose stored form is infinite.

    Raises:
        FormatError: names the weight and the type.
    """
    infinite = ~np.isfinite(stored)
    if infinite.any():
        raise FormatError(
            f"The weight {values.reshape(-1)[infinite.argmax()]:.6g} is too large for {name}.",
            "Choose the type f32 instead.",
        )


def _to_half(scale: np.ndarray, peak: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = scale.astype("<f2")
    refuse_overflow(half[:, 0], peak[:, 0], name)
    return half


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale; 0 where the scale is so small that its inverse is infinite: so are its weights."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def encode_q8_0(values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Halves are rounded away from zero. Importance changes nothing, as in ggml."""
    blocks = values.reshape(-1, SIZE)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    half = _to_half(scale, blocks, "Q8_0")
    scaled = blocks * _inverse(scale)
    size = np.abs(scaled)
    whole = np.floor(size)
    rounded = np.copysign(whole + np.floor(2 * (size - whole)), scaled).astype(np.int8)
    return np.concatenate([half.view(np.uint8), rounded.view(np.uint8)], axis=1)


def decode_q8_0(data: np.ndarray) -> np.ndarray:
    """d · q."""
    blocks = data.reshape(-1, 34)
    return blocks[:, 2:].view(np.int8).astype(np.float32) * halves(blocks, 0)


def encode_q4_0(values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """d · (q − 8)."""
    half, q = _symmetric(values, importance, 4)
    return np.concatenate([half.view(np.uint8), _pack_nibbles(q)], axis=1)


def encode_q5_0(values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """d · (q − 16)."""
    half, q = _symmetric(values, importance, 5)
    return np.concatenate([half.view(np.uint8), _pack_fifth_bits(q), _pack_nibbles(q)], axis=1)


def encode_q4_1(values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """d · q + m."""
    half, least, q = _asymmetric(values, importance, 4)
    return np.concatenate([half.view(np.uint8), least.view(np.uint8), _pack_nibbles(q)], axis=1)


def encode_q5_1(values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """d · q + m."""
    half, least, q = _asymmetric(values, importance, 5)
    return np.concatenate(
        [half.view(np.uint8), least.view(np.uint8), _pack_fifth_bits(q), _pack_nibbles(q)], axis=1
    )


def _symmetric(values: np.ndarray, importance: np.ndarray | None, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The scale of each block as stored, and its weights' numbers from 0 to 2^bits − 1."""
    blocks = values.reshape(-1, SIZE)
    middle = 1 << (bits - 1)
    name = f"Q{bits}_0"
    at = np.abs(blocks).argmax(axis=1, keepdims=True)
    peak = np.take_along_axis(blocks, at, 1)
    if importance is None:
        scale = peak / np.float32(-middle)
        half = _to_half(scale, peak, name)
        # what ggml writes as a cast to integers: the sum is never negative
        q = np.trunc(blocks * _inverse(scale) + np.float32(middle + 0.5))
        return half, np.minimum(q, 2 * middle - 1).astype(np.uint8)
    weights = _weights(values, importance)
    scale = fit_scale(blocks.T, weights.T, middle)[:, None]
    half = _to_half(scale, peak, name)
    q = np.rint(blocks * _inverse(half.astype(np.float32)))
    return half, (np.clip(q, -middle, middle - 1) + middle).astype(np.uint8)


def _asymmetric(
    values: np.ndarray, importance: np.ndarray | None, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scale and least value of each block as stored, and its weights' numbers from 0 to 2^bits − 1."""
    blocks = values.reshape(-1, SIZE)
    name, top = f"Q{bits}_1", np.float32((1 << bits) - 1)
    least, most = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    if importance is None:
        with np.errstate(over="ignore"):
            scale = (most - least) / top
        half, half_least = _to_half(scale, most, name), _to_half(least, least, name)
        q = np.trunc((blocks - least) * _inverse(scale) + np.float32(0.5))
        return half, half_least, np.clip(q, 0, top).astype(np.uint8)
    weights = _weights(values, importance)
    plain = _rounded_line(blocks, (most - least) / top, least, top, name)
    scale, offset = fit_offset(blocks.T, weights.T, int(top))
    searched = _rounded_line(blocks, scale[:, None], offset[:, None], top, name)
    # Weights that come from such blocks already lie on their steps; a search in float32 may miss that by a hair.
    errors = [
        (weights * (half.astype(np.float32) * q + at.astype(np.float32) - blocks) ** 2).sum(1, keepdims=True)
        for half, at, q in (plain, searched)
    ]
    better = errors[1] < errors[0]
    half, half_least, q = (np.where(better, new, old) for new, old in zip(searched, plain))
    return half, half_least, q.astype(np.uint8)


def _rounded_line(
    blocks: np.ndarray, scale: np.ndarray, least: np.ndarray, top: np.float32, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale and least value in half precision, and the nearest numbers for what they then are."""
    half, half_least = _to_half(scale, blocks, name), _to_half(least, least, name)
    q = np.rint((blocks - half_least.astype(np.float32)) * _inverse(half.astype(np.float32)))
    return half, half_least, np.clip(q, 0, top)


def _weights(values: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """What an error of each weight costs: (blocks, 32). `values` has shape (rows, columns)."""
    spread = np.square(values).mean(axis=1, keepdims=True)
    return (importance * np.sqrt(spread + np.square(values))).reshape(-1, SIZE)


def _pack_nibbles(q: np.ndarray) -> np.ndarray:
    low = q & 15
    return low[:, :16] | low[:, 16:] << 4


def _pack_fifth_bits(q: np.ndarray) -> np.ndarray:
    return np.packbits(q >> 4, axis=1, bitorder="little")


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _five_bits(high: np.ndarray, packed: np.ndarray) -> np.ndarray:
    return _nibbles(packed) | np.unpackbits(high, axis=1, bitorder="little") << 4


def decode_q4_0(data: np.ndarray) -> np.ndarray:
    """d · (q − 8)."""
    blocks = data.reshape(-1, 18)
    return halves(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def decode_q4_1(data: np.ndarray) -> np.ndarray:
    """d · q + m."""
    blocks = data.reshape(-1, 20)
    return halves(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + halves(blocks, 2)


def decode_q5_0(data: np.ndarray) -> np.ndarray:
    """d · (q − 16)."""
    blocks = data.reshape(-1, 22)
    return halves(blocks, 0) * (_five_bits(blocks[:, 2:6], blocks[:, 6:]).astype(np.float32) - 16)


def decode_q5_1(data: np.ndarray) -> np.ndarray:
    """d · q + m."""
    blocks = data.reshape(-1, 24)
    return halves(blocks, 0) * _five_bits(blocks[:, 4:8], blocks[:, 8:]).astype(np.float32) + halves(
        blocks, 2
    )


def decode_iq4_nl(data: np.ndarray) -> np.ndarray:
    """d · table[q]."""
    blocks = data.reshape(-1, 18)
    return halves(blocks, 0) * NONLINEAR[_nibbles(blocks[:, 2:])]


def decode_mxfp4(data: np.ndarray) -> np.ndarray:
    """2^(e − 128) · table[q]: the table holds doubled values of FP4, so that all are whole."""
    blocks = data.reshape(-1, 17)
    scale = np.exp2(blocks[:, :1].astype(np.float64) - 128).astype(np.float32)
    return scale * _FP4[_nibbles(blocks[:, 1:])]
