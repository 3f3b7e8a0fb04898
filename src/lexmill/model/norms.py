"""Norms over the width: RMS norm (Zhang & Sennrich 2019) and layer norm (Ba et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.config import ModelConfig
from lexmill.model.kernels import kernels_for, learns_on_cpu

_CACHED = 1 << 17  # numbers that training works on at once, so that they stay in a core's cache


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of a block."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.norm_bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, over the last axis.

    torch has no kernel of its own for it on CPUs: training there takes a compiled one, or goes through
    some rows at a time, and writes the number format that the next product reads.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        usual = x.dtype in (torch.float32, torch.bfloat16) and self.weight.dtype == torch.float32
        if not (usual and learns_on_cpu(x)):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        return _RMSNorm.apply(x, self.weight, self.eps, dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        rows = x.reshape(-1, x.shape[-1])
        if compiled := kernels_for(rows):
            out, inverse = compiled.rms_norm(rows, weight, eps, dtype)
            ctx.save_for_backward(rows, weight, inverse)
            return out.view(x.shape)
        inverse = torch.empty(len(rows), 1)
        out = torch.empty(rows.shape, dtype=dtype)
        some = max(1, _CACHED // x.shape[-1])
        normed = torch.empty(min(some, len(rows)), x.shape[-1])
        for start in range(0, len(rows), some):
            part = slice(start, start + some)
            exact, scale = rows[part].float(), inverse[part]
            unit = normed[: len(exact)]
            torch.mean(torch.mul(exact, exact, out=unit), -1, keepdim=True, out=scale).add_(eps).rsqrt_()
            torch.mul(torch.mul(exact, scale, out=unit), weight, out=out[part])
        ctx.save_for_backward(rows, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, inverse = ctx.saved_tensors
        width = rows.shape[-1]
        down = gradient.reshape(rows.shape)
        if compiled := kernels_for(rows):
            to_rows, to_weight = compiled.rms_norm_back(rows, weight, inverse, down)
            return to_rows.view(gradient.shape), to_weight, None, None
        to_rows, to_weight = torch.empty_like(rows), torch.zeros_like(weight)
        some = max(1, _CACHED // width)
        normed, product = torch.empty(2, min(some, len(rows)), width)
        for start in range(0, len(rows), some):
            part = slice(start, start + some)
            count = len(rows[part])
            unit = torch.mul(rows[part], inverse[part], out=normed[:count])
            along = torch.mul(down[part], unit, out=product[:count])
            to_weight += along.sum(0)
            # what would only make the row longer has no effect
            radial = torch.mv(along, weight)[:, None].div_(-width)
            found = torch.mul(down[part], weight, out=along).addcmul_(unit, radial)
            torch.mul(found, inverse[part], out=to_rows[part])
        return to_rows.view(gradient.shape), to_weight, None, None
