"""Types of GGUF tensors whose blocks hold 256 weights ("K-quants"): bytes to float32, and the ones that we write.

A block is cut into 8 or 16 parts. Each part has a small whole number as its scale, and in some types
another as its offset; the block has the half-precision units that these count in. Layouts:
ggml-common.h; the values of a weight: dequantize_row_* in ggml-quants.c. How the scales are found is
our own (`formats/fitting.py`).
"""

from __future__ import annotations

import numpy as np

from lexmill.errors import FormatError
from lexmill.formats.blocks32 import NONLINEAR, halves
from lexmill.formats.fitting import fit_offset_block, fit_scale_block

SIZE = 256
_LARGEST = 1e9  # more than any of these types can hold; and far from where sums of squares overflow


def _planes(packed: np.ndarray, bits: int) -> np.ndarray:
    """Take bytes apart into fields of `bits`, lowest first: (blocks, bytes) to (blocks, fields, bytes)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[:, None, :] >> shifts) & np.uint8((1 << bits) - 1)


def _together(fields: np.ndarray, bits: int) -> np.ndarray:
    """Undo `_planes`: (blocks, fields, bytes) to (blocks, bytes)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(fields.astype(np.uint8) << shifts, axis=1)


def _in_groups(packed: np.ndarray, bits: int, group: int) -> np.ndarray:
    """All numbers of a block in the order of its weights; each `group` bytes hold 8 / bits runs of weights."""
    blocks = len(packed)
    return _planes(packed.reshape(-1, group), bits).reshape(blocks, -1)


def _group(q: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Undo `_in_groups`."""
    fields = q.reshape(-1, 8 // bits, group)
    return _together(fields, bits).reshape(len(q), -1)


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 offsets in the 12 bytes of Q4_K and Q5_K, each (blocks, 8)."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], axis=1)
    offsets = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], axis=1)
    return scales, offsets


def _pack_six_bit_pairs(scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = offsets[:, :4] | (offsets[:, 4:] >> 4) << 6
    rest = (scales[:, 4:] & 15) | (offsets[:, 4:] & 15) << 4
    return np.concatenate([first, second, rest], axis=1)


def _parts(q: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """scales · q − offsets, both one number a part: (blocks, 256)."""
    parts = q.reshape(*scales.shape, -1).astype(np.float32)
    values = scales[:, :, None] * parts
    return (values if offsets is None else values - offsets[:, :, None]).reshape(len(q), -1)


def decode_q4_k(data: np.ndarray) -> np.ndarray:
    """d · scale · q − dmin · offset, 8 parts."""
    blocks = data.reshape(-1, 144)
    scales, offsets = _six_bit_pairs(blocks[:, 4:16])
    q = _in_groups(blocks[:, 16:], 4, 32)
    return _parts(q, halves(blocks, 0) * scales, halves(blocks, 2) * offsets)


def decode_q5_k(data: np.ndarray) -> np.ndarray:
    """As Q4_K with a fifth bit: bit i of byte j belongs to weight j of part i."""
    blocks = data.reshape(-1, 176)
    scales, offsets = _six_bit_pairs(blocks[:, 4:16])
    high = _planes(blocks[:, 16:48], 1).reshape(-1, SIZE)
    q = _in_groups(blocks[:, 48:], 4, 32) | high << 4
    return _parts(q, halves(blocks, 0) * scales, halves(blocks, 2) * offsets)


def decode_q6_k(data: np.ndarray) -> np.ndarray:
    """d · scale · (q − 32), 16 parts; two halves of 128 weights, each with bytes of its own."""
    blocks = data.reshape(-1, 210)
    q = _in_groups(blocks[:, :128], 4, 64) | _in_groups(blocks[:, 128:192], 2, 32) << 4
    scales = halves(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return _parts(q.view(np.int8) - np.int8(32), scales)


def decode_q2_k(data: np.ndarray) -> np.ndarray:
    """d · scale · q − dmin · offset, 16 parts whose two numbers share a byte."""
    blocks = data.reshape(-1, 84)
    both = blocks[:, :16]
    q = _in_groups(blocks[:, 16:80], 2, 32)
    return _parts(q, halves(blocks, 80) * (both & 15), halves(blocks, 82) * (both >> 4))


def decode_q3_k(data: np.ndarray) -> np.ndarray:
    """d · (scale − 32) · (q − 4), 16 parts; a third bit that is missing takes four away."""
    blocks = data.reshape(-1, 110)
    high = _planes(blocks[:, :32], 1).reshape(-1, SIZE)
    q = (_in_groups(blocks[:, 32:96], 2, 32) | high << 2).view(np.int8) - np.int8(4)
    low = _planes(blocks[:, 96:104], 4).reshape(-1, 16)
    scales = (low | _planes(blocks[:, 104:108], 2).reshape(-1, 16) << 4).view(np.int8) - np.int8(32)
    return _parts(q, halves(blocks, 108) * scales)


def decode_iq4_xs(data: np.ndarray) -> np.ndarray:
    """d · (scale − 32) · table[q], 8 parts; in a part the low halves of 16 bytes come first."""
    blocks = data.reshape(-1, 136)
    shifts = np.arange(0, 16, 2, dtype=np.uint16)
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> shifts & 3
    low = _planes(blocks[:, 4:8].reshape(-1, 1), 4).reshape(-1, 8)
    scales = (low | high.astype(np.uint8) << 4).view(np.int8) - np.int8(32)
    q = _in_groups(blocks[:, 8:], 4, 16)
    return _parts(NONLINEAR[q], halves(blocks, 0) * scales)


def encode_q4_k(values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """The inverse of `decode_q4_k`, by search."""
    units, scales, offsets, q = fit_offset_block(*_blocks(values, importance), 15)
    return np.concatenate(
        [_to_half(units, "Q4_K"), _pack_six_bit_pairs(scales, offsets), _group(q, 4, 32)], axis=1
    )


def encode_q5_k(values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """The inverse of `decode_q5_k`, by search."""
    units, scales, offsets, q = fit_offset_block(*_blocks(values, importance), 31)
    high = _together((q >> 4).reshape(-1, 8, 32), 1)
    return np.concatenate(
        [_to_half(units, "Q5_K"), _pack_six_bit_pairs(scales, offsets), high, _group(q & 15, 4, 32)], axis=1
    )


def encode_q6_k(values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """The inverse of `decode_q6_k`, by search."""
    unit, scales, q = fit_scale_block(*_blocks(values, importance))
    low, high = _group(q & 15, 4, 64), _group(q >> 4, 2, 32)
    return np.concatenate([low, high, scales.view(np.uint8), _to_half(unit, "Q6_K")], axis=1)


def _to_half(units: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(units).all():
        raise FormatError(f"A weight is too large for {name}.", "Choose the type f32 instead.")
    return np.ascontiguousarray(units.astype("<f2")).view(np.uint8)


def _blocks(values: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows as blocks of 256, and what an error in each column costs, beside them."""
    if np.abs(values).max(initial=0) > _LARGEST:
        raise FormatError(
            f"The weight {np.abs(values).max():.6g} is too large for K-quants.",
            "Choose the type f32 instead.",
        )
    blocks = values.reshape(-1, SIZE)
    if importance is None:
        return blocks, None
    return blocks, np.broadcast_to(importance, values.shape).reshape(-1, SIZE)
