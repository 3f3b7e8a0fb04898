"""The MLP of a block: plain, or gated (Shazeer 2020, "GLU Variants Improve Transformer")."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))
