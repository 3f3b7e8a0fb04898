"""What a Transformer looks like, and the same facts as Hugging Face's `config.json`. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lexmill.errors import ConfigError, ModelError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder: Llama by default, Qwen2 with `qkv_bias`, Qwen3 with `qk_norm`.

    Grouped-query attention when `kv_heads < heads`; the output projection shares the embedding
    when `tied`.
    """

    vocab_size: int
    width: int  # of the residual stream ("hidden_size")
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int  # inside the gated MLP ("intermediate_size")
    context: int  # tokens that positions are made for
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "width",
            "layers",
            "heads",
            "kv_heads",
            "head_width",
            "mlp_width",
            "context",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1, but is {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise ConfigError(f"'heads' ({self.heads}) must be a multiple of 'kv_heads' ({self.kv_heads}).")
        if self.head_width % 2:
            raise ConfigError(f"'head_width' ({self.head_width}) must be even: rotary positions turn pairs.")
        for name in ("rope_theta", "norm_eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"'{name}' must be a positive number, but is {getattr(self, name)}.")
        if self.qkv_bias and self.qk_norm:
            raise ConfigError("'qkv_bias' and 'qk_norm' together make a shape that no runtime holds.")

    @property
    def family(self) -> str:
        """The name of this shape in Hugging Face's `model_type` and GGUF's `general.architecture`."""
        return "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias else "llama"

    @property
    def parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        attention += self.head_width * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        attention += 2 * self.head_width if self.qk_norm else 0
        block = attention + 3 * self.width * self.mlp_width + 2 * self.width
        return self.layers * block + self.width + self.vocab_size * self.width * (1 if self.tied else 2)

    def to_huggingface(self) -> dict[str, Any]:
        """The model's part of `config.json`, readable by transformers 4 and 5."""
        architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
        values: dict[str, Any] = {
            "architectures": [architecture[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            # transformers 4 reads the first form, 5 the second
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tied,
            "attention_dropout": 0.0,
        }
        if self.family == "llama":
            values |= {"attention_bias": False, "mlp_bias": False}
        else:
            values |= {"use_sliding_window": False}
            if self.family == "qwen3":
                values |= {"attention_bias": False}
        return values

    @classmethod
    def from_huggingface(cls, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read `config.json` of a Llama, Qwen2 or Qwen3 model.

        Raises:
            ModelError: another architecture, a missing value, or a feature that is not supported.
        """

        def get(key: str, kind: type, default: Any = None) -> Any:
            value = values.get(key)
            value = default if value is None else value
            if value is None:
                raise ModelError(
                    f"{where}: the key '{key}' is missing.", "The file may be cut off; copy it again."
                )
            number = kind is float and isinstance(value, int) and not isinstance(value, bool)
            if not (isinstance(value, kind) or number) or (kind is int and isinstance(value, bool)):
                raise ModelError(f"{where}: '{key}' should be of type {kind.__name__}, but is {value!r}.")
            return kind(value)

        family = get("model_type", str)
        if family not in ("llama", "qwen2", "qwen3"):
            raise ModelError(
                f"{where}: the model type '{family}' is not supported.",
                "Supported are llama, qwen2 and qwen3.",
            )
        _refuse_unsupported(values, family, where)
        heads, width = get("num_attention_heads", int), get("hidden_size", int)
        rope = values.get("rope_parameters") or {}
        try:
            return cls(
                vocab_size=get("vocab_size", int),
                width=width,
                layers=get("num_hidden_layers", int),
                heads=heads,
                kv_heads=get("num_key_value_heads", int, heads),
                head_width=get("head_dim", int, width // max(heads, 1)),
                mlp_width=get("intermediate_size", int),
                context=get("max_position_embeddings", int, 2048),
                rope_theta=float(rope.get("rope_theta", get("rope_theta", float, 10000.0))),
                norm_eps=get("rms_norm_eps", float, 1e-6),
                tied=get("tie_word_embeddings", bool, False),
                qkv_bias=family == "qwen2",
                qk_norm=family == "qwen3",
            )
        except ConfigError as error:
            raise ModelError(f"{where}: {error.message}", error.hint) from error


def _refuse_unsupported(values: Mapping[str, Any], family: str, where: str) -> None:
    """A feature that would be ignored in silence is an error instead: the answers would differ."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"{where}: 'rope_parameters' should be a table.")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    problems = {
        f"rotary scaling of type '{rope_type}'": rope_type != "default",
        f"the activation '{values.get('hidden_act')}'": values.get("hidden_act", "silu") != "silu",
        "biases in attention": bool(values.get("attention_bias")) and family != "qwen2",
        "biases in the MLP": bool(values.get("mlp_bias")),
        "sliding-window attention": bool(values.get("use_sliding_window")),
    }
    for problem, present in problems.items():
        if present:
            raise ModelError(f"{where}: {problem} is not supported yet.")
