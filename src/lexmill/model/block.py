"""One layer of a Transformer: attention, then an MLP, each on a normed copy and added back."""

from __future__ import annotations

from torch import Tensor, nn

from lexmill.model.attention import Attention
from lexmill.model.cache import LayerCache
from lexmill.model.config import ModelConfig
from lexmill.model.mlp import GatedMLP


class Block(nn.Module):
    """Pre-norm residual block; norms are RMS norms (Zhang & Sennrich 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self,
        x: Tensor,  # (batch, time, width)
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        cached: int = 0,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache, cached, weights)
        return x + self.mlp(self.mlp_norm(x))
