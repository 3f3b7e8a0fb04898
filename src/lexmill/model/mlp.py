"""The MLP of a block: plain, or gated (Shazeer 2020, "GLU Variants Improve Transformer")."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model import kernels
from lexmill.model.config import ModelConfig
from lexmill.model.kernels import KERNELS, fits

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
        self.compiled = kernels.ACTIVATIONS.get(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down(self._gated(self.gate(x), self.up(x)))
        return self.down(self.activation(self.up(x)))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and gate.requires_grad
        if learning and KERNELS is not None and self.compiled is not None and fits(gate, up):
            return _Gated.apply(gate, up, self.compiled)
        return self.activation(gate) * up


class _Gated(torch.autograd.Function):
    """act(gate) * up in one pass forward and one back; act(gate) is not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: int) -> Tensor:  # type: ignore[override]
        assert KERNELS is not None
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return KERNELS.gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        assert KERNELS is not None
        gate, up = ctx.saved_tensors
        return *KERNELS.gated_back(gate, up, gradient.contiguous(), ctx.activation), None
