"""How scales of quantised blocks are found: weighted least squares over many trials, all parts at once.

A part of a block is a column here: arrays have the shape (weights of a part, parts), so that sums run
over whole rows of memory. For each part some scales are tried; each rounds the weights to whole
numbers, and for those the best scale (and offset) has a closed form. The least weighted error wins.
The idea is that of ggml's make_qx_quants and make_qkx2_quants. Then, unlike ggml, whole numbers,
scales and units are improved in turn, because rounding the scales themselves changes what fits best.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Whole numbers that the range of a part is given more than it has: above 0 the ends are cut off. Around a
# scale alone the cut is kept small: more lowered the divergence of models, but raised their perplexity.
_OFFSET_TRIALS = np.arange(-5, 13, dtype=np.float32) / 5
_SCALE_TRIALS = np.arange(-5, 6, dtype=np.float32) / 5
_ROUNDS = 2  # of improving in turn what was found


def fit_scale(x: np.ndarray, weights: np.ndarray, middle: int) -> np.ndarray:
    """The scale of each part for whole numbers from −middle to middle − 1.

    Args:
        x: (weights of a part, parts), float32.
        weights: what an error costs, the same shape, none negative.

    Returns:
        (parts,), float32; of either sign, and 0 where all is 0.
    """
    x = np.ascontiguousarray(x)
    weighted = weights * x
    peak = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    inverse_peak = _inverse(peak)
    best, scale = np.zeros_like(peak), np.zeros_like(peak)
    for trial in _SCALE_TRIALS:
        # the weight farthest from zero goes to the end that reaches one farther, or to the other
        for end in (-middle - trial, middle - 1 + trial):
            if end > 0 and trial < 0:
                continue
            q = x * (end * inverse_peak)
            np.clip(np.rint(q, out=q), -middle, middle - 1, out=q)
            along = (weighted * q).sum(0)
            np.multiply(q, q, out=q)
            size = np.multiply(q, weights, out=q).sum(0)
            found = along * _inverse(size)
            gain = along * found  # by how much the error is less than with a scale of 0
            better = gain > best
            best, scale = np.where(better, gain, best), np.where(better, found, scale)
    return scale


def fit_offset(
    x: np.ndarray, weights: np.ndarray, top: int, *, below_zero: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The scale and offset of each part, x ≈ scale · q + offset with q from 0 to `top`.

    Args:
        x, weights: as in `fit_scale`.
        below_zero: the offset may not be above zero.

    Returns:
        scales (none negative) and offsets, each (parts,), float32.
    """
    x = np.ascontiguousarray(x)
    least, most = x.min(0), x.max(0)
    if below_zero:
        least = np.minimum(least, 0)
    inverse_range = _inverse(most - least)
    weighted, total, sum_x = weights * x, weights.sum(0), (weights * x).sum(0)
    best = np.full_like(least, -np.inf)
    scale, offset = np.zeros_like(least), least
    above = x - least
    for trial in _OFFSET_TRIALS:
        q = above * ((top + trial) * inverse_range)
        np.minimum(np.rint(q, out=q), top, out=q)
        sums = _sums(q, weights, weighted, total, sum_x)
        found, at, gain = _line(sums, below_zero)
        better = gain > best
        best = np.where(better, gain, best)
        scale, offset = np.where(better, found, scale), np.where(better, at, offset)
    for _ in range(_ROUNDS):  # nearest numbers for the line, then the best line for the numbers: never worse
        q = _whole(x, np.stack([scale, -offset]), top)
        scale, offset, _ = _line(_sums(q, weights, weighted, total, sum_x), below_zero)
    return scale, offset


class _Sums(NamedTuple):
    """What the best line through a part's weights depends on: weighted sums over the part."""

    one: np.ndarray
    x: np.ndarray
    q: np.ndarray
    qq: np.ndarray
    xq: np.ndarray


def _sums(
    q: np.ndarray, weights: np.ndarray, weighted: np.ndarray, total: np.ndarray, sum_x: np.ndarray
) -> _Sums:
    part = weights * q
    sum_q = part.sum(0)
    np.multiply(part, q, out=part)
    return _Sums(total, sum_x, sum_q, part.sum(0), np.multiply(weighted, q, out=part).sum(0))


def _line(sums: _Sums, below_zero: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best scale and offset, and how much of Σ w x² they explain."""
    one, x, q, qq, xq = sums
    inverse = _inverse(one * qq - q * q)
    scale, offset = (one * xq - x * q) * inverse, (qq * x - q * xq) * inverse
    flat = inverse == 0  # every q the same
    scale, offset = np.where(flat, 0, scale), np.where(flat, x * _inverse(one), offset)
    if below_zero:
        through_zero = xq * _inverse(qq)
        scale, offset = np.where(offset > 0, through_zero, scale), np.minimum(offset, 0)
    negative = scale < 0
    scale, offset = np.where(negative, 0, scale), np.where(negative, x * _inverse(one), offset)
    if below_zero:
        offset = np.minimum(offset, 0)
    gain = 2 * (scale * xq + offset * x) - (
        scale * scale * qq + 2 * scale * offset * q + offset * offset * one
    )
    return scale, offset, gain


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / values, and 0 where that is not finite."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.float32(1) / values
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _as_half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _as_larger_half(values: np.ndarray) -> np.ndarray:
    """Rounded away from zero: tiny units are coarse, and one too small would cut its largest scales off."""
    half = values.astype(np.float16)
    short = np.abs(half.astype(np.float32)) < np.abs(values)
    away = np.copysign(np.float16(np.inf), half)
    return np.where(short, np.nextafter(half, away), half).astype(np.float32)


def _in_parts(array: np.ndarray, parts: int) -> np.ndarray:
    """(blocks, 256) to (256 / parts, blocks * parts)."""
    return np.ascontiguousarray(array.reshape(len(array) * parts, -1).T)


def _in_blocks(q: np.ndarray, blocks: int) -> np.ndarray:
    return np.ascontiguousarray(q.T).reshape(blocks, -1)


def error_costs(blocks: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """What an error of each weight of blocks of 256 costs.

    Large weights count more: they meet large sums. With importance (the mean square of what a column
    is multiplied with) it is that, and large weights count more by less. After ggml-quants.c.
    """
    if importance is None:
        parts = blocks.reshape(len(blocks) * 8, -1)
        spread = np.sqrt(np.square(parts).mean(1, keepdims=True))
        return (spread + np.abs(parts)).reshape(blocks.shape)
    spread = 2 * np.square(blocks).mean(1, keepdims=True)
    return importance * np.sqrt(spread + np.square(blocks))


def fit_offset_block(
    blocks: np.ndarray, importance: np.ndarray | None, top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of 8 parts with 6-bit scales and offsets: weight ≈ unit · scale · q − unit' · offset.

    Args:
        blocks: (blocks, 256), float32.
        importance: of each column, the same shape.
        top: the largest q.

    Returns:
        units (blocks, 2), float32 that half precision holds; scales and offsets (blocks, 8), uint8 up to 63;
        q (blocks, 256), uint8.
    """
    x, weights = _in_parts(blocks, 8), _in_parts(error_costs(blocks, importance), 8)
    weighted, total = weights * x, weights.sum(0)
    sum_x = weighted.sum(0)
    found, least = fit_offset(x, weights, top, below_zero=True)
    real = np.stack([found, -least]).reshape(2, -1, 8)
    units = _as_larger_half(real.max(-1) / 63)  # (2, blocks)
    numbers = np.clip(np.rint(real * _inverse(units)[:, :, None]), 0, 63).reshape(2, -1)
    for _ in range(_ROUNDS):
        wide = np.repeat(units, 8, axis=1)
        numbers, _ = _better_numbers(x, weights, wide, numbers, top)
        q = _whole(x, wide * numbers, top)
        changed = _better_units(_sums(q, weights, weighted, total, sum_x), units, numbers)
        error = _block_errors(x, weights, units, numbers, top)
        better = _block_errors(x, weights, changed, numbers, top) < error
        units = np.where(better, changed, units)
    q = _whole(x, np.repeat(units, 8, axis=1) * numbers, top)
    scales, offsets = numbers.astype(np.uint8).reshape(2, -1, 8)
    return units.T, scales, offsets, _in_blocks(q.astype(np.uint8), len(blocks))


def _whole(x: np.ndarray, line: np.ndarray, top: int) -> np.ndarray:
    """The nearest q of each weight, where `line` is (scale, offset below zero)."""
    q = x + line[1]
    np.multiply(q, _inverse(line[0]), out=q)
    return np.clip(np.rint(q, out=q), 0, top, out=q)


def _errors(x: np.ndarray, weights: np.ndarray, line: np.ndarray, top: int) -> np.ndarray:
    """The weighted squared error of each part."""
    q = _whole(x, line, top)
    np.multiply(q, line[0], out=q)
    np.subtract(q, line[1], out=q)
    np.subtract(q, x, out=q)
    np.multiply(q, q, out=q)
    return np.multiply(q, weights, out=q).sum(0)


def _block_errors(
    x: np.ndarray, weights: np.ndarray, units: np.ndarray, numbers: np.ndarray, top: int
) -> np.ndarray:
    return _errors(x, weights, np.repeat(units, 8, axis=1) * numbers, top).reshape(-1, 8).sum(1)


def _better_numbers(
    x: np.ndarray, weights: np.ndarray, units: np.ndarray, numbers: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each part's scale and offset, or those one above or below where that is better; and the errors."""
    best, least = numbers, _errors(x, weights, units * numbers, top)
    for scale in (-1, 0, 1):
        for offset in (-1, 0, 1):
            if scale or offset:
                tried = np.clip(numbers + np.array([[scale], [offset]], np.float32), 0, 63)
                error = _errors(x, weights, units * tried, top)
                better = error < least
                least, best = np.where(better, error, least), np.where(better, tried, best)
    return best, least


def _better_units(sums: _Sums, units: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The units that fit best for these whole numbers, (2, blocks)."""
    scales, offsets = numbers

    def over_block(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, 8).sum(1)

    aa, ab = over_block(scales * scales * sums.qq), over_block(scales * offsets * sums.q)
    bb = over_block(offsets * offsets * sums.one)
    a, b = over_block(scales * sums.xq), over_block(offsets * sums.x)
    inverse = _inverse(aa * bb - ab * ab)
    both = np.stack([(bb * a - ab * b) * inverse, (ab * a - aa * b) * inverse])
    fine = (inverse != 0) & (both >= 0).all(0)
    return np.where(fine, _as_half(both), units)


def fit_scale_block(
    blocks: np.ndarray, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of 16 parts with 8-bit scales: weight ≈ unit · scale · (q − 32), q of 6 bits.

    Args:
        blocks, importance: as in `fit_offset_block`.

    Returns:
        unit (blocks, 1), float32 that half precision holds; scales (blocks, 16), int8; q (blocks, 256), uint8.
    """
    x, weights = _in_parts(blocks, 16), _in_parts(error_costs(blocks, importance), 16)
    weighted = weights * x
    real = fit_scale(x, weights, 32).reshape(-1, 16)
    peak = np.take_along_axis(real, np.abs(real).argmax(1)[:, None], 1)
    unit = _as_larger_half(peak[:, 0] / -128)  # the largest scale becomes −128: the other end is one nearer
    numbers = np.clip(np.rint(real * _inverse(unit)[:, None]), -128, 127).reshape(-1)
    for _ in range(_ROUNDS):
        wide = np.repeat(unit, 16)
        best, least = numbers, _scale_errors(x, weights, wide * numbers)
        for step in (-1, 1):
            tried = np.clip(numbers + np.float32(step), -128, 127)
            error = _scale_errors(x, weights, wide * tried)
            better = error < least
            least, best = np.where(better, error, least), np.where(better, tried, best)
        numbers = best
        q = _signed(x, wide * numbers)
        along = ((weighted * q).sum(0) * numbers).reshape(-1, 16).sum(1)
        size = ((weights * q * q).sum(0) * numbers * numbers).reshape(-1, 16).sum(1)
        changed = _as_half(along * _inverse(size))
        errors = _scale_errors(x, weights, np.repeat(changed, 16) * numbers)
        better = errors.reshape(-1, 16).sum(1) < least.reshape(-1, 16).sum(1)
        unit = np.where(better, changed, unit)
    q = _signed(x, np.repeat(unit, 16) * numbers) + 32
    return (
        unit[:, None],
        numbers.astype(np.int8).reshape(-1, 16),
        _in_blocks(q.astype(np.uint8), len(blocks)),
    )


def _signed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    q = x * _inverse(scale)
    return np.clip(np.rint(q, out=q), -32, 31, out=q)


def _scale_errors(x: np.ndarray, weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    q = _signed(x, scale)
    np.multiply(q, scale, out=q)
    np.subtract(q, x, out=q)
    np.multiply(q, q, out=q)
    return np.multiply(q, weights, out=q).sum(0)
