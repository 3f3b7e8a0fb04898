"""The shape of a model as a GGUF file tells it: the way back from `gguf_shapes`, for files made by anyone.

A setting that lexmill's model does not have is refused, never passed over: the answers would
differ without a word. Keys: llama.cpp, src/llama-arch.cpp and src/models/.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lexmill.errors import ConfigError, ModelError
from lexmill.formats.gguf import GGUFFile
from lexmill.model.config import FAMILIES, FAMILY_DEFAULTS, ModelConfig
from lexmill.model.gguf_keys import HINT, Keys
from lexmill.model.gguf_rope import NEUTRAL as ROPE_NEUTRAL
from lexmill.model.gguf_rope import SCALING_KEYS, scaling_from_gguf
from lexmill.model.gguf_shapes import ACTIVATION_KEY, POOLING
from lexmill.model.huggingface_config import global_period

# llama.cpp's name of each family.
ARCHITECTURES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "bert", "t5")},
    "modern-bert": "modernbert",
}
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
    **ROPE_NEUTRAL,
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
)
_OWN = {
    **dict.fromkeys(_DECODERS, SCALING_KEYS),
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
    keys = Keys(file, named)
    heads, width = keys.whole("attention.head_count"), keys.whole("embedding_length")
    head_width = keys.whole("attention.key_length", width // max(heads, 1))
    if keys.whole("attention.value_length", head_width) != head_width:
        raise ModelError(f"{file.path}: values of another width than keys are not supported.", HINT)
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


def _own_values(file: GGUFFile, keys: Keys, family: str, head_width: int) -> dict[str, Any]:
    """What only some of the families have."""
    if family in _DECODERS:
        turned = keys.whole("rope.dimension_count", head_width)
        if turned != head_width:
            raise ModelError(
                f"{file.path}: rotary positions on {turned} of {head_width} coordinates are not supported.",
                HINT,
            )
        return {
            "rope_theta": keys.real("rope.freq_base", 10000.0),
            "rope_scaling": scaling_from_gguf(file, keys, head_width),
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


def _modernbert_values(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    named = keys.find("hidden_activation")
    activation = "gelu" if named is None else _GATED_ACTIVATIONS.get(str(named))
    if activation is None:
        raise ModelError(f"{file.path}: the activation '{str(named)[:60]}' is not supported yet.", HINT)
    if keys.find("attention.causal") is True:
        raise ModelError(f"{file.path}: an encoder that sees only what comes before is not supported.", HINT)
    window = keys.whole("attention.sliding_window", 0)
    return {
        "norm_eps": keys.real("attention.layer_norm_epsilon"),
        "activation": activation_of(file, activation) if activation == "gelu" else activation,
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        "local_theta": keys.real("rope.freq_base_swa", 10000.0),
        "local_window": window,
        "global_every": _global_every(keys) if window else 3,
    }


def _global_every(keys: Keys) -> int:
    """Every how many layers one sees all: said as a number, or layer by layer as whether it is a local one."""
    name = "attention.sliding_window_pattern"
    said = keys.find(name)
    if isinstance(said, (list, np.ndarray)):
        every = global_period([bool(local) for local in said[: keys.count("block_count")]])
    else:
        every = keys.whole(name, 3)
    if not every:  # as a number, 0 means that all are local
        raise ModelError(f"{keys.where}: this order of local and global layers is not supported.", HINT)
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
        raise ModelError(f"{file.path}: pooling of the kind {str(code)[:20]} is not supported.", HINT)
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
            HINT,
        )
