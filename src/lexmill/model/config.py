"""What a Transformer looks like: three shapes, and the flags that make each family. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lexmill.errors import ConfigError
from lexmill.model.rope_scaling import RopeScaling

Shape = Literal["decoder", "encoder", "encoder_decoder"]

# The flags that make a family. What is not named here has its default in `ModelConfig`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"shape": "decoder"},
    "qwen2": {"shape": "decoder", "qkv_bias": True},
    "qwen3": {"shape": "decoder", "qk_norm": True},
    "bert": {
        "shape": "encoder",
        "positions": "learned",
        "norm": "layer",
        "norm_bias": True,
        "post_norm": True,
        "embed_norm": True,
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    "modernbert": {"shape": "encoder", "norm": "layer", "embed_norm": True},
    "t5": {"shape": "encoder_decoder", "positions": "relative", "scale_scores": False},
}
# Flags that a family leaves open, and what a new model of it gets.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "bert": {"activation": "gelu", "segments": 2, "norm_eps": 1e-12},
    "modernbert": {
        "activation": "gelu",
        "local_window": 128,
        "global_every": 3,
        "rope_theta": 160000.0,
    },
    "t5": {"activation": "gelu_tanh", "norm_eps": 1e-6},
}
# Flags by which families differ; a model's must be those of one family.
_MARKS = (
    "shape",
    "positions",
    "norm",
    "post_norm",
    "embed_norm",
    "qkv_bias",
    "qk_norm",
    "scale_scores",
)
# Flags that only some families can leave at something else than their default.
_ONLY_IN = {
    "gated": ("t5", "bert"),
    "norm_bias": ("bert", "modernbert"),
    "out_bias": ("bert", "modernbert"),
    "mlp_bias": ("bert", "modernbert"),
    "local_window": ("modernbert",),
    "segments": ("bert",),
    "scale_output": ("t5",),
    "mlm": ("bert", "modernbert"),
    "nsp": ("bert",),
    "pooler": ("bert",),
    "labels": ("bert", "modernbert"),
    "span": ("bert", "modernbert"),
    "label_pooling": ("modernbert",),
    "rope_scaling": ("llama", "qwen2", "qwen3"),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Transformer and its flags. Llama's decoder where nothing else is said.

    Grouped-query attention when `kv_heads < heads`; the output projection shares the embedding
    when `tied`.
    """

    vocab_size: int
    width: int  # of the residual stream ("hidden_size")
    layers: int  # of the decoder or encoder; of the encoder where there are both
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int  # inside the MLP ("intermediate_size")
    context: int  # tokens that positions are made for; of each side where there are two
    shape: Shape = "decoder"
    decoder_layers: int = 0  # of an encoder–decoder
    positions: Literal["rotary", "learned", "relative"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_window: int = 0  # local layers see half of it to each side; 0: every layer sees all
    local_theta: float = 10000.0  # rotary base of local layers
    global_every: int = 3  # with a local window: each n-th layer, from the first, sees all
    relative_buckets: int = 32
    relative_distance: int = 128  # tokens; everything farther away shares a bucket
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_eps: float = 1e-5
    post_norm: bool = False  # norms behind each sum, not before each part
    embed_norm: bool = False  # a norm on the embeddings; then the first layer needs none before attention
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    scale_scores: bool = True  # attention scores divided by sqrt(head_width)
    segments: int = 0  # kinds of segment embeddings ("token types")
    tied: bool = True
    decoder_start: int = 0  # the id that an encoder–decoder begins to write with
    scale_output: bool = False  # hidden states times 1/sqrt(width) before the output projection
    mlm: bool = False  # a masked-language-modelling head
    mlm_bias: bool = False  # a bias inside a head's dense layer
    pooler: bool = False  # a dense layer on the first token
    nsp: bool = False  # a next-sentence head on the pooler
    labels: tuple[str, ...] = ()  # of a head that classifies texts; none: there is no such head
    label_pooling: Literal["cls", "mean"] = "cls"  # what that head reads: the first token, or the mean of all
    span: bool = False  # a head that finds where an answer begins and ends
    dropout: float = 0.0  # in training, on what each part adds to the residual stream

    def __post_init__(self) -> None:
        whole = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "context")
        for name in (*whole, "global_every", "relative_distance"):
            if getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1, but is {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise ConfigError(f"'heads' ({self.heads}) must be a multiple of 'kv_heads' ({self.kv_heads}).")
        if self.positions == "rotary" and self.head_width % 2:
            raise ConfigError(f"'head_width' ({self.head_width}) must be even: rotary positions turn pairs.")
        for name in ("rope_theta", "local_theta", "norm_eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"'{name}' must be a positive number, but is {getattr(self, name)}.")
        if self.rope_scaling is not None and self.rope_theta <= 1:
            raise ConfigError(f"A rotary scaling needs a 'rope_theta' above 1, but it is {self.rope_theta}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"'dropout' must lie in [0, 1), but is {self.dropout}.")
        if self.positions == "relative" and (self.relative_buckets < 4 or self.relative_buckets % 4):
            raise ConfigError(f"'relative_buckets' ({self.relative_buckets}) must be a multiple of 4.")
        if (self.shape == "encoder_decoder") != (self.decoder_layers > 0):
            raise ConfigError(
                f"'decoder_layers' is {self.decoder_layers}, but the shape is '{self.shape}'.",
                "An encoder–decoder needs at least 1; the other shapes have only 'layers'.",
            )
        if not 0 <= self.decoder_start < self.vocab_size:
            raise ConfigError(f"'decoder_start' ({self.decoder_start}) is outside the vocabulary.")
        self._check_heads()
        if self.shape != "decoder" and self.kv_heads != self.heads:
            raise ConfigError(f"'kv_heads' below 'heads' fits decoders only, not the shape '{self.shape}'.")
        self._check_family()

    def _check_heads(self) -> None:
        heads = {"mlm or nsp": self.mlm or self.nsp, "labels": bool(self.labels), "span": self.span}
        if sum(heads.values()) > 1:  # as Hugging Face's classes have them
            present = " and ".join(f"'{name}'" for name, there in heads.items() if there)
            raise ConfigError(f"A model has the head of one task, not of several: {present}.")
        if self.nsp and not self.pooler:
            raise ConfigError("A next-sentence head ('nsp') stands on the pooler: set 'pooler' too.")
        if len(set(self.labels)) != len(self.labels):
            raise ConfigError("'labels' names a label twice.")
        if self.label_pooling not in ("cls", "mean"):
            raise ConfigError(f"There is no 'label_pooling' {self.label_pooling!r}.", "Take cls or mean.")
        if self.positions == "learned" and ((self.labels and not self.pooler) or (self.span and self.pooler)):
            raise ConfigError("In BERT's shape 'labels' stands on the pooler, and 'span' has none.")

    def _check_family(self) -> None:
        family = self._find_family()
        if family is None:
            marks = ", ".join(f"{mark} = {getattr(self, mark)!r}" for mark in _MARKS)
            raise ConfigError(
                f"These flags together make a shape that no runtime holds: {marks}.",
                f"Take those of one family: {', '.join(FAMILIES)}.",
            )
        for flag, families in _ONLY_IN.items():
            default = type(self).__dataclass_fields__[flag].default
            if getattr(self, flag) != default and family not in families:
                raise ConfigError(f"'{flag}' does not fit {family}'s shape, only {' and '.join(families)}.")

    def _find_family(self) -> str | None:
        fields = type(self).__dataclass_fields__
        for family, flags in FAMILIES.items():
            if all(getattr(self, mark) == flags.get(mark, fields[mark].default) for mark in _MARKS):
                return family
        return None

    @property
    def family(self) -> str:
        """The name of these flags in Hugging Face's `model_type` and GGUF's `general.architecture`."""
        family = self._find_family()
        assert family is not None  # checked when it was made
        return family

    def is_local(self, layer: int) -> bool:
        """Whether this layer sees only a window."""
        return self.local_window > 0 and layer % self.global_every != 0

    @property
    def parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        from lexmill.model.names import weight_shapes

        return sum(math.prod(shape) for shape in weight_shapes(self).values())

    def to_huggingface(self) -> dict[str, Any]:
        """The model's part of `config.json`, readable by transformers 4 and 5."""
        from lexmill.model.huggingface_config import write_config

        return write_config(self)

    @classmethod
    def from_huggingface(
        cls, values: Mapping[str, Any], where: str = "config.json", weights: Collection[str] = ()
    ) -> ModelConfig:
        """Read `config.json` of a model of a known family.

        Args:
            weights: names of the weights beside it; they tell which heads the model has.

        Raises:
            ModelError: another architecture, a missing value, or a feature that is not supported.
        """
        from lexmill.model.huggingface_config import read_config

        return read_config(values, where, weights)
