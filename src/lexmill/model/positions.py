"""How a Transformer knows where a token stands: rotary positions, and biases by distance.

Rotary (Su et al. 2021, "RoFormer"): queries and keys are turned by their position. Relative
(Raffel et al. 2020, T5): each head adds a learned number to a score, by how far the key is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lexmill.model.kernels import kernels_for
from lexmill.model.rope_scaling import RopeScaling


def rotary_table(
    positions: Tensor, head_width: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine for each position and each pair of coordinates.

    Args:
        positions: integers, any shape S.

    Returns:
        Two float32 tensors of shape (*S, head_width // 2).
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.int64).float() / head_width
    periods = theta**exponents
    if scaling is None:
        frequencies = 1.0 / periods
    else:
        frequencies = torch.from_numpy(scaling.frequencies(periods.numpy(), theta))
    angles = positions.float()[..., None] * frequencies.to(positions.device)
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.magnitude != 1:
        return cos * scaling.magnitude, sin * scaling.magnitude
    return cos, sin


class _Rotate(torch.autograd.Function):
    """One pass forward and one back: the gradient of a rotation is the rotation the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        batch, time, heads, width = x.shape
        # in memory each head's positions lie together, as attention's products want them
        return _turn(x, cos, sin, 1.0, x.new_empty(batch, heads, time, width).transpose(1, 2))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, sin, -1.0, gradient.new_empty(gradient.shape)), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor) -> Tensor:
    compiled = kernels_for(x)
    if compiled and x.stride(-1) == 1:
        compiled.rotate(x, out, cos, sin, sign)
        return out
    cos, sin = (part.unsqueeze(-2).to(x.dtype) for part in (cos, sin))
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + D/2) of the last axis, as Hugging Face's Llama pairs them.

    Args:
        x: (batch, time, heads, D).
        table: from `rotary_table`, of shape (batch or 1, time, D / 2).
    """
    if torch.compiler.is_compiling():  # torch.compile fuses the plain form, and fails at writing into views
        cos, sin = (part.unsqueeze(-2).to(x.dtype) for part in table)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return _Rotate.apply(x, *table)


class RelativeBias(nn.Module):
    """T5's position biases: (1, heads, queries, keys), to be added to attention scores."""

    def __init__(self, buckets: int, heads: int, distance: int, causal: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(buckets, heads))
        self._distance, self._causal = distance, causal

    def forward(self, queries: int, keys: int) -> Tensor:
        """The last of `keys` stands where the last of `queries` does."""
        device = self.weight.device
        query = torch.arange(keys - queries, keys, device=device)[:, None]
        offset = torch.arange(keys, device=device)[None] - query
        buckets = relative_bucket(offset, len(self.weight), self._distance, self._causal)
        return self.weight[buckets].permute(2, 0, 1)[None]


def relative_bucket(offset: Tensor, buckets: int, distance: int, causal: bool) -> Tensor:
    """The bucket of each offset (key minus query): one a step nearby, then ever wider ones.

    Args:
        offset: integers, any shape.
        buckets: how many in all; where keys may lie behind the query too, half for each side.
        distance: from here on everything shares the last bucket.
    """
    if causal:
        side, steps = torch.zeros_like(offset), (-offset).clamp(min=0)
    else:
        buckets //= 2
        side, steps = (offset > 0).long() * buckets, offset.abs()
    exact = buckets // 2
    grown = torch.log(steps.clamp(min=1).float() / exact) / math.log(distance / exact) * (buckets - exact)
    far = (exact + grown.long()).clamp(max=buckets - 1)
    return side + torch.where(steps < exact, steps, far)
