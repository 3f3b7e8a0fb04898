"""The shape of a new model as a recipe states it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lexmill.errors import ConfigError
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """The `[pretrain.model]` table; the vocabulary comes from the tokenizer. None: the family's own default."""

    family: Literal["llama", "qwen2", "qwen3", "bert", "modernbert", "t5"] = "llama"
    width: int = 256
    layers: int = 4  # of the encoder where there are two sides
    decoder_layers: int | None = None  # as many as 'layers' when not given
    heads: int = 4
    kv_heads: int | None = None  # as many as heads when not given
    mlp_width: int | None = None  # three times the width where the MLP is gated, else four times
    context: int = 256
    rope_theta: float | None = None
    local_window: int | None = None  # modernbert: tokens that local layers see
    global_every: int | None = None  # modernbert: each n-th layer sees all
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    dropout: float = 0.0

    @property
    def shape(self) -> str:
        """ "decoder", "encoder" or "encoder_decoder"."""
        return FAMILIES[self.family]["shape"]

    def with_vocabulary(self, vocab_size: int, **heads: bool) -> ModelConfig:
        """The complete configuration; `heads` are those of an encoder: `mlm`, `pooler`, `nsp`."""
        if self.width % self.heads:
            raise ConfigError(f"'width' ({self.width}) must be a multiple of 'heads' ({self.heads}).")
        flags = {**FAMILIES[self.family], **FAMILY_DEFAULTS[self.family]}
        gated = flags.get("gated", True)
        given: dict[str, Any] = {
            name: value
            for name, value in (
                ("rope_theta", self.rope_theta),
                ("local_window", self.local_window),
                ("global_every", self.global_every),
                ("qkv_bias", self.qkv_bias or None),
                ("qk_norm", self.qk_norm or None),
            )
            if value is not None
        }
        if self.shape == "encoder_decoder":
            given["decoder_layers"] = self.decoder_layers or self.layers
        elif self.decoder_layers is not None:
            raise ConfigError(f"'decoder_layers' fits an encoder–decoder (t5), not {self.family}.")
        return ModelConfig(
            **{
                **flags,
                **heads,
                **given,
                "vocab_size": vocab_size,
                "width": self.width,
                "layers": self.layers,
                "heads": self.heads,
                "kv_heads": self.kv_heads or self.heads,
                "head_width": self.width // self.heads,
                "mlp_width": self.mlp_width or (3 if gated else 4) * self.width,
                "context": self.context,
                "tied": self.tied,
                "dropout": self.dropout,
            }
        )
