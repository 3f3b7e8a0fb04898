"""Rotary positions (Su et al. 2021, "RoFormer"): queries and keys are turned by their position."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine for each position and each pair of coordinates.

    Args:
        positions: integers, any shape S.

    Returns:
        Two float32 tensors of shape (*S, head_width // 2).
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.int64).float() / head_width
    frequencies = 1.0 / (theta**exponents)
    angles = positions.float()[..., None] * frequencies.to(positions.device)
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    """One pass forward and one back: the gradient of a rotation is the rotation the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + D/2) of the last axis, as Hugging Face's Llama pairs them.

    Args:
        x: (batch, time, heads, D).
        table: from `rotary_table`, of shape (batch or 1, time, D / 2).
    """
    cos, sin = (part.unsqueeze(-2).to(x.dtype) for part in table)
    return _Rotate.apply(x, cos, sin)
