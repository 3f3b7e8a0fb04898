"""The shape of a model as a GGUF file tells it: the way back from `gguf_shapes`, for files made by anyone.

A setting that lexmill's model does not have is refused, never passed over: the answers would
differ without a word. Keys: llama.cpp, src/llama-arch.cpp and src/models/.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lexmill.errors import ConfigError, FormatError, ModelError
from lexmill.formats.gguf import GGUFFile
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.huggingface_config import global_period
from lexmill.runtimes.gguf_shapes import ACTIVATION_KEY, POOLING

# llama.cpp's name of each family.
ARCHITECTURES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "bert", "t5")},
    "modern-bert": "modernbert",
}
_HINT = "Take the model's Hugging Face directory, or another model."
_DECODERS = ("llama", "qwen2", "qwen3")

# Settings that say nothing where they have these values; with others they change what a model computes.
_NEUTRAL: dict[str, Collection[Any]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),  # what llama.cpp's rows of q and k are
    "rope.scaling.type": ("none", ""),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.finetuned": (True, False),
    "rope.scale_linear": (0.0, 1.0),
}
# Read below, or said again elsewhere in the file.
_READ = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_log_multiplier",
)
_OWN = {
    "bert": ("pooling_type", "attention.causal"),
    "modern-bert": (
        "pooling_type",
        "attention.causal",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "rope.freq_base_swa",
        "hidden_activation",
    ),
    "t5": ("attention.relative_buckets_count", "decoder_block_count", "decoder_start_token_id"),
}
_OWN_TENSORS = {"rope_freqs.weight": "rotary positions scaled as in Llama 3.1"}


class _Keys:
    """Reads the settings of one architecture and complains by their names."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.values, self.prefix, self.where = file.metadata, prefix, str(file.path)
        self.tensors = len(file.tensors)

    def find(self, name: str) -> Any:
        return self.values.get(f"{self.prefix}.{name}")

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.find(name)
        if isinstance(value, np.ndarray):  # one number a layer; all the same in the shapes known here
            distinct = set(value.tolist())
            if len(distinct) != 1:
                raise ModelError(f"{self.where}: '{self.prefix}.{name}' differs from layer to layer.", _HINT)
            value = distinct.pop()
        value = default if value is None else value
        if value is None or isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise self.wrong(name, value)
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A number of layers: each has tensors, so a file with fewer of them lies."""
        layers = self.whole(name, default)
        if layers > self.tensors:
            raise self.wrong(name, layers)
        return layers

    def real(self, name: str, default: float | None = None) -> float:
        value = self.find(name)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.wrong(name, value)
        return tidy(float(value))

    def wrong(self, name: str, value: Any) -> FormatError:
        found = "is missing" if value is None else f"is {str(value)[:60]}"
        return FormatError(
            f"{self.where}: the setting '{self.prefix}.{name}' {found}.", "The file is damaged or incomplete."
        )


def tidy(value: float) -> float:
    """The shortest decimal that is the same float32: files say 1e-05 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def config_from_gguf(file: GGUFFile, rows: int) -> ModelConfig:
    """The model's shape, after checking that lexmill computes the same.

    Args:
        rows: of the embedding, which is the number of tokens.

    Raises:
        ModelError: an architecture or a setting that lexmill's model does not have.
        FormatError: a setting is missing or makes no sense.
    """
    named = file.metadata.get("general.architecture")
    if not isinstance(named, str) or named not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: models of the architecture '{str(named)[:60]}' cannot be imported.",
            f"Those of {', '.join(ARCHITECTURES)} can.",
        )
    family = ARCHITECTURES[named]
    _refuse_unknown(file.metadata, named, str(file.path))
    for tensor, what in _OWN_TENSORS.items():
        if tensor in file.tensors and not np.array_equal(file.read(tensor), np.ones_like(file.read(tensor))):
            raise ModelError(f"{file.path}: {what} ('{tensor}') are not supported yet.", _HINT)
    keys = _Keys(file, named)
    heads, width = keys.whole("attention.head_count"), keys.whole("embedding_length")
    head_width = keys.whole("attention.key_length", width // max(heads, 1))
    if keys.whole("attention.value_length", head_width) != head_width:
        raise ModelError(f"{file.path}: values of another width than keys are not supported.", _HINT)
    values = {
        **FAMILIES[family],
        **FAMILY_DEFAULTS[family],
        "vocab_size": rows,
        "width": width,
        "layers": keys.count("block_count"),
        "heads": heads,
        "kv_heads": keys.whole("attention.head_count_kv", heads),
        "head_width": head_width,
        "mlp_width": keys.whole("feed_forward_length"),
        "context": keys.whole("context_length"),
        **_own_values(file, keys, family, head_width),
    }
    try:
        return ModelConfig(**values)
    except ConfigError as error:
        raise ModelError(f"{file.path}: {error.message}", error.hint) from error


def _own_values(file: GGUFFile, keys: _Keys, family: str, head_width: int) -> dict[str, Any]:
    """What only some of the families have."""
    if family in _DECODERS:
        turned = keys.whole("rope.dimension_count", head_width)
        if turned != head_width:
            raise ModelError(
                f"{file.path}: rotary positions on {turned} of {head_width} coordinates are not supported.",
                _HINT,
            )
        return {
            "rope_theta": keys.real("rope.freq_base", 10000.0),
            "norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
            "tied": "output.weight" not in file.tensors,
        }
    if family == "bert":
        segments = file.metadata.get("tokenizer.ggml.token_type_count", 0)
        if "token_types.weight" in file.tensors:
            segments = file.tensors["token_types.weight"].shape[0]
        return {
            "norm_eps": keys.real("attention.layer_norm_epsilon"),
            "segments": segments if isinstance(segments, int) else -1,
            "activation": activation_of(file, "gelu"),
        }
    if family == "modernbert":
        return _modernbert_values(file, keys)
    gated = "enc.blk.0.ffn_gate.weight" in file.tensors
    layers = keys.count("block_count")
    return {
        "norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "decoder_layers": keys.count("decoder_block_count", layers),
        "decoder_start": keys.whole("decoder_start_token_id", 0),
        "relative_buckets": keys.whole("attention.relative_buckets_count"),
        "gated": gated,
        "activation": "gelu_tanh" if gated else "relu",
        "tied": "output.weight" not in file.tensors,
    }


# `hidden_activation` of ModernBERT, as llama.cpp understands it (src/llama-model.cpp); it gates all of them.
_GATED_ACTIVATIONS = {"gelu": "gelu", "geglu": "gelu", "silu": "silu", "swish": "silu", "swiglu": "silu"}


def _modernbert_values(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    named = keys.find("hidden_activation")
    activation = "gelu" if named is None else _GATED_ACTIVATIONS.get(str(named))
    if activation is None:
        raise ModelError(f"{file.path}: the activation '{str(named)[:60]}' is not supported yet.", _HINT)
    if keys.find("attention.causal") is True:
        raise ModelError(f"{file.path}: an encoder that sees only what comes before is not supported.", _HINT)
    window = keys.whole("attention.sliding_window", 0)
    return {
        "norm_eps": keys.real("attention.layer_norm_epsilon"),
        "activation": activation_of(file, activation) if activation == "gelu" else activation,
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        "local_theta": keys.real("rope.freq_base_swa", 10000.0),
        "local_window": window,
        "global_every": _global_every(keys) if window else 3,
    }


def _global_every(keys: _Keys) -> int:
    """Every how many layers one sees all: said as a number, or layer by layer as whether it is a local one."""
    name = "attention.sliding_window_pattern"
    said = keys.find(name)
    if isinstance(said, (list, np.ndarray)):
        every = global_period([bool(local) for local in said[: keys.count("block_count")]])
    else:
        every = keys.whole(name, 3)
    if not every:  # as a number, 0 means that all are local
        raise ModelError(f"{keys.where}: this order of local and global layers is not supported.", _HINT)
    return every


def activation_of(file: GGUFFile, default: str) -> str:
    """The activation that lexmill noted in its own files; llama.cpp has one compiled in."""
    noted = file.metadata.get(ACTIVATION_KEY, default)
    return noted if isinstance(noted, str) and noted in ("gelu", "gelu_tanh") else default


def pooling_of(file: GGUFFile) -> str:
    """How an encoder's tokens become one vector.

    Raises:
        ModelError: as a rank, which needs a classifier that lexmill does not have.
    """
    code = file.metadata.get(f"{file.metadata.get('general.architecture')}.pooling_type", 1)
    names = {number: name for name, number in POOLING.items()}
    name = names.get(code) if isinstance(code, int) else None
    if name in (None, "rank"):
        raise ModelError(f"{file.path}: pooling of the kind {str(code)[:20]} is not supported.", _HINT)
    return name if name in ("cls", "last") else "mean"


def _refuse_unknown(metadata: Mapping[str, Any], prefix: str, where: str) -> None:
    known = {*_READ, *_OWN.get(prefix, ())}
    for key, value in metadata.items():
        name = key.removeprefix(f"{prefix}.")
        if name == key or name in known:
            continue
        if name in _NEUTRAL and (isinstance(value, (str, bool, int, float)) and value in _NEUTRAL[name]):
            continue
        raise ModelError(
            f"{where}: the model has the setting '{key}' = {str(value)[:60]}, which is not supported yet.",
            _HINT,
        )
