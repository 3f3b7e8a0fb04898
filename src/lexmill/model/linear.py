"""Linear layers. In training in bfloat16 on a CPU with AMX, compiled code finds the gradients of their weights.

torch's product Gᵀ X reads both sides against the order in which they lie in memory (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.kernels import Kernels, kernels_for, learns_on_cpu


class Linear(nn.Linear):
    """x Wᵀ + b, with weights of shape (outputs, inputs)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.bias, self.weight)


def linear(x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
    """x Wᵀ + b, where W is `weights`, one below the other: one product for several layers of the same input.

    Args:
        x: (…, inputs).
        bias: (outputs of all,).
        weights: (outputs, inputs) each.
    """
    compiled = kernels_for(x)
    if compiled and compiled.finds_weight_gradients and _learns_in_bfloat16(weights):
        return _Linear.apply(x, bias, compiled, *weights)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        weight = weight.to(x.dtype)  # a base that is kept in 16 bits
    return F.linear(x, weight, bias)


def _learns_in_bfloat16(weights: tuple[Tensor, ...]) -> bool:
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and all(weight.dtype == torch.float32 and learns_on_cpu(weight) for weight in weights)
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b. With a bias by oneDNN itself: `F.linear` first writes the bias to each row, to add to it."""
    fused = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if bias is not None else None
    if fused is None or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    return fused(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """Products in bfloat16; the gradients of weights and bias are summed, and stay, in float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, bias: Tensor | None, compiled: Kernels, *weights: Tensor
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            inputs = x.bfloat16()
            parts = [weight.bfloat16() for weight in weights]
            weight = parts[0] if len(parts) == 1 else torch.cat(parts)
            ctx.save_for_backward(inputs, weight)
            ctx.compiled, ctx.dtype, ctx.biased = compiled, x.dtype, bias is not None
            ctx.outputs = [len(part) for part in parts]
            return _product(inputs, weight, None if bias is None else bias.bfloat16())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        to_x = (gradient @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        to_weight, to_bias = ctx.compiled.weight_gradient(
            rows, inputs.reshape(-1, inputs.shape[-1]).contiguous(), biased=ctx.biased
        )
        return to_x, to_bias, None, *to_weight.split(ctx.outputs)
