"""The gated MLP (Shazeer 2020, "GLU Variants Improve Transformer"): silu(gate(x)) * up(x), then down."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.config import ModelConfig


class GatedMLP(nn.Module):
    """(…, width) to (…, width) by way of (…, mlp_width)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
