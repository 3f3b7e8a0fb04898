"""The MLP of a block: plain, or gated (Shazeer 2020, "GLU Variants Improve Transformer")."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """(…, width) to (…, width) by way of (…, mlp_width): down(act(gate(x)) * up(x)), or down(act(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.gated:
            self.gate = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)
        self.gated, self.activation = config.gated, ACTIVATIONS[config.activation]
        self.kernels = _KERNELS.get(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down(self._gated(self.gate(x), self.up(x)))
        return self.down(self.activation(self.up(x)))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.kernels and gate.device.type == "cpu" and torch.is_grad_enabled() and gate.requires_grad:
            return _Gated.apply(gate, up, *self.kernels)
        return self.activation(gate) * up


_CACHED = 1 << 17  # numbers that training works on at once, so that they stay in a core's cache
_aten = torch.ops.aten
# An activation into a given place, and the gradient of it.
_KERNELS: dict[str, tuple[Any, Any]] = {
    "silu": (_aten.silu.out, _aten.silu_backward.grad_input),
    "gelu": (_aten.gelu.out, _aten.gelu_backward.grad_input),
    "gelu_tanh": (
        partial(_aten.gelu.out, approximate="tanh"),
        partial(_aten.gelu_backward.grad_input, approximate="tanh"),
    ),
}


class _Gated(torch.autograd.Function):
    """act(gate) * up, some rows at a time; act(gate) is made again on the way back instead of kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Any, act_backward: Any) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(gate)
        for gate_part, up_part, out_part in _parts(gate, up, out):
            act(gate_part, out=out_part).mul_(up_part)
        ctx.save_for_backward(gate, up)
        ctx.kernels = act, act_backward
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        act, act_backward = ctx.kernels
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        for down, gate_part, up_part, to_gate_part, to_up_part in _parts(gradient, gate, up, to_gate, to_up):
            torch.mul(act(gate_part, out=to_up_part), down, out=to_up_part)
            act_backward(down * up_part, gate_part, grad_input=to_gate_part)
        return to_gate, to_up, None, None


def _parts(*tensors: Tensor) -> Any:
    """Tensors of one shape, (…, width), as parts of some rows."""
    some = max(1, _CACHED // tensors[0].shape[-1])
    return zip(*(tensor.reshape(-1, tensor.shape[-1]).split(some) for tensor in tensors))
