"""The MLP of a block: plain, or gated (Shazeer 2020, "GLU Variants Improve Transformer")."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model import kernels
from lexmill.model.adapted import adapted
from lexmill.model.config import ModelConfig
from lexmill.model.kernels import Kernels, kernels_for, learns_on_cpu
from lexmill.model.linear import Linear

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
            self.gate = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = Linear(config.mlp_width, config.width, bias=config.mlp_bias)
        self.gated, self.activation = config.gated, ACTIVATIONS[config.activation]
        self.compiled = kernels.ACTIVATIONS.get(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(self._activated(self.up(x), None))
        gate, up = adapted(x, [self.gate], [self.up]) or (self.gate(x), self.up(x))
        return self.down(self._activated(gate, up))

    def _activated(self, gate: Tensor, up: Tensor | None) -> Tensor:
        compiled = kernels_for(gate)
        if compiled and self.compiled is not None and learns_on_cpu(gate):
            return _Activated.apply(gate, up, compiled, self.compiled)
        activated = self.activation(gate)
        return activated if up is None else activated * up


class _Activated(torch.autograd.Function):
    """act(gate) * up, or act(gate), in one pass forward and one back; act(gate) is not kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, gate: Tensor, up: Tensor | None, compiled: Kernels, activation: int
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.compiled, ctx.activation = compiled, activation
        return compiled.gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return *ctx.compiled.gated_back(gate, up, gradient.contiguous(), ctx.activation), None, None
