"""Norms over the width: RMS norm (Zhang & Sennrich 2019) and layer norm (Ba et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.config import ModelConfig
from lexmill.model.kernels import DTYPES, Kernels, kernels_for, learns_on_cpu

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
        if compiled := _compiled_for(self, x, None):
            return _AddNorm.apply(x, None, self.weight, None, self, compiled, False)[1]
        usual = x.dtype in DTYPES and self.weight.dtype == torch.float32
        if not (usual and learns_on_cpu(x)):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps, _products_dtype())


def add_norm(
    norm: nn.Module, x: Tensor, branch: Tensor | None, *, post: bool = False
) -> tuple[Tensor, Tensor]:
    """Add a branch to the stream and norm the sum; training on a CPU does it in one pass.

    Args:
        norm: from `make_norm`, or nn.Identity.
        x: (..., width), the stream.
        branch: of the same shape; None where there is nothing to add.
        post: the stream goes on normed, as BERT's does.

    Returns:
        The stream from here on, and the normed sum as the next products read it.
    """
    if compiled := _compiled_for(norm, x, branch):
        bias = getattr(norm, "bias", None)
        x, normed = _AddNorm.apply(x, branch, norm.weight, bias, norm, compiled, post)
        return x, x if normed is None else normed
    x = x if branch is None else x + branch
    normed = norm(x)
    return normed if post else x, normed


def _products_dtype() -> torch.dtype:
    """The number format that products in training on a CPU read."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def _compiled_for(norm: nn.Module, x: Tensor, branch: Tensor | None) -> Kernels | None:
    """The compiled steps, where this is training and they take these."""
    usual = isinstance(norm, (RMSNorm, nn.LayerNorm)) and norm.weight.dtype == torch.float32
    if branch is not None:
        usual = usual and x.dtype == torch.float32 and kernels_for(branch) is not None
    learns = learns_on_cpu(x) if branch is None else learns_on_cpu(x, branch)
    return kernels_for(x) if usual and learns and _products_dtype() in DTYPES else None


class _AddNorm(torch.autograd.Function):
    """The compiled `add_norm`; the second result is None where it would be the first."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        norm: RMSNorm | nn.LayerNorm,
        compiled: Kernels,
        post: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        added = None if branch is None else branch.reshape(rows.shape).contiguous()
        ctx.centred, ctx.biased = isinstance(norm, nn.LayerNorm), bias is not None
        total, normed, exact, statistics = compiled.add_norm(
            rows, added, weight, bias, norm.eps, _products_dtype(), centred=ctx.centred, exact=post
        )
        ctx.save_for_backward(total, weight, statistics)
        ctx.set_materialize_grads(False)
        ctx.compiled, ctx.post, ctx.shape = compiled, post, x.shape
        ctx.branch = None if branch is None else branch.dtype
        normed = normed.view(x.shape)
        if not post:
            return x if branch is None else total.view(x.shape), normed
        return (normed, None) if exact is None else (exact.view(x.shape), normed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, weight, statistics = ctx.saved_tensors
        from_stream, from_normed = (
            None if gradient is None else gradient.reshape(total.shape).contiguous() for gradient in gradients
        )
        if not ctx.post and from_normed is None:  # only the sum was used
            from_normed = torch.zeros_like(total)
        below = (None, from_normed, from_stream) if ctx.post else (from_stream, from_normed, None)
        branch = ctx.branch or total.dtype
        to_x, to_branch, to_weight, to_bias = ctx.compiled.add_norm_back(
            total, weight, statistics, below, branch, centred=ctx.centred, biased=ctx.biased
        )
        to_branch = None if ctx.branch is None else to_branch.view(ctx.shape)
        return to_x.view(ctx.shape), to_branch, to_weight, to_bias, None, None, None


class _RMSNorm(torch.autograd.Function):
    """RMS norm without compiled steps, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        rows = x.reshape(-1, x.shape[-1])
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
