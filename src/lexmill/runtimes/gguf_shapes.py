"""What a GGUF file says of a model's shape, which of its weights llama.cpp has a place for, and what it cannot hold.

Keys: llama.cpp, src/llama-arch.cpp and src/models/.
"""

from __future__ import annotations

import numpy as np

from lexmill.errors import ModelError
from lexmill.formats.gguf import Value, boolean, f32, string, u32
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory
from lexmill.model.names import WeightName, weight_names

POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}  # llama.h, enum llama_pooling_type
_WRITTEN_POOLING = ("mean", "cls", "last")  # ways to make one vector of a text
_OUTPUT = "output.weight"
ACTIVATION_KEY = "lexmill.activation"  # llama.cpp has one compiled in, and GGUF no key for it


def require_place(config: ModelConfig, where: str) -> None:
    """Refuse what llama.cpp has no form for, or would compute in another way without a word.

    Raises:
        ModelError: says what.
    """
    activations = {True: "gelu_tanh", False: "relu"}
    problems = {
        # BERT's graph in llama.cpp adds the first segment's vector and has the tanh form of GELU compiled in
        "bert": {
            "no segment embeddings": not config.segments,
            f"the activation '{config.activation}'": config.activation not in ("gelu", "gelu_tanh"),
        },
        "t5": {
            f"relative positions up to {config.relative_distance}": config.relative_distance != 128,
            f"the activation '{config.activation}' in its MLP": config.activation
            != activations[config.gated],
            # its cache has as many layers as the encoder
            "a decoder with more layers than the encoder": config.decoder_layers > config.layers,
        },
        "modernbert": {"ModernBERT's shape": True},
    }
    for problem, present in problems.get(config.family, {}).items():
        if present:
            what = (
                "is not exported to GGUF" if config.family == "modernbert" else "fits no model of llama.cpp"
            )
            raise ModelError(f"{where}: {problem} {what}.", "It runs in transformers: lexmill export hf.")


def shape_metadata(config: ModelConfig, pooling: str = "mean") -> dict[str, Value]:
    """What a file says of a model's shape and constants.

    Args:
        pooling: how an encoder's tokens become one vector.

    Raises:
        ModelError: llama.cpp does not pool like that.
    """
    if pooling not in _WRITTEN_POOLING:
        raise ModelError(f"llama.cpp has no pooling '{pooling}'.", f"It has {', '.join(_WRITTEN_POOLING)}.")
    shape = {
        "context_length": u32(config.context),
        "embedding_length": u32(config.width),
        "block_count": u32(config.layers),
        "feed_forward_length": u32(config.mlp_width),
        "attention.head_count": u32(config.heads),
        "vocab_size": u32(config.vocab_size),
    }
    if config.family == "bert":
        shape |= {
            "attention.layer_norm_epsilon": f32(config.norm_eps),
            "attention.causal": boolean(False),
            "pooling_type": u32(POOLING[pooling]),
        }
    else:
        shape |= {
            "attention.head_count_kv": u32(config.kv_heads),
            "attention.key_length": u32(config.head_width),
            "attention.value_length": u32(config.head_width),
            "attention.layer_norm_rms_epsilon": f32(config.norm_eps),
        }
    if config.family == "t5":
        shape |= {
            "attention.layer_norm_epsilon": f32(config.norm_eps),
            "attention.relative_buckets_count": u32(config.relative_buckets),
            "decoder_block_count": u32(config.decoder_layers),
            "decoder_start_token_id": u32(config.decoder_start),
        }
    elif config.family != "bert":
        shape |= {"rope.dimension_count": u32(config.head_width), "rope.freq_base": f32(config.rope_theta)}
    metadata = {f"{config.family}.{key}": value for key, value in shape.items()}
    if config.segments:
        metadata["tokenizer.ggml.token_type_count"] = u32(config.segments)
    if config.family == "bert":
        metadata[ACTIVATION_KEY] = string(config.activation)
    return metadata


def held_weights(config: ModelConfig) -> list[WeightName]:
    """The weights that a GGUF file holds; heads that llama.cpp has no place for are left out.

    llama.cpp never scales what an encoder–decoder gives out, so where the model does, the projection
    is written scaled, and as one of its own where it shares the embedding.
    """
    names = [name for name in weight_names(config) if name.gguf]
    if config.scale_output and config.tied:
        names.append(WeightName("embed.weight", "lm_head.weight", _OUTPUT))
    return names


def weight_in_gguf(model: ModelDirectory, name: WeightName) -> np.ndarray:
    """A weight as a file holds it, float32."""
    weight, config = model.weight(name.own), model.config
    if name.rope and config.family == "llama":
        return permute_rope(weight, config.heads if name.rope == "q" else config.kv_heads)
    if name.gguf == _OUTPUT and config.scale_output:
        return weight * np.float32(config.width**-0.5)
    return weight


def weight_from_gguf(weight: np.ndarray, config: ModelConfig, name: WeightName) -> np.ndarray:
    """Undo `weight_in_gguf`."""
    if name.rope and config.family == "llama":
        return unpermute_rope(weight, config.heads if name.rope == "q" else config.kv_heads)
    if name.gguf == _OUTPUT and config.scale_output:
        return weight * np.float32(config.width**0.5)
    return weight


def stays_f32(name: WeightName, shape: tuple[int, ...]) -> bool:
    """Norms, biases, and the small tables that are added to something."""
    return len(shape) == 1 or name.own.endswith(
        ("position_embed.weight", "segment_embed.weight", "relative.weight")
    )


def permute_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection for llama.cpp's `llama` architecture.

    Hugging Face turns coordinate i together with i + D/2 of each head of D coordinates; llama.cpp
    turns 2i with 2i + 1. So row i of a head goes to 2i, and row i + D/2 to 2i + 1.

    Args:
        weight: (heads * D, inputs), or (heads * D,) for a bias.
    """
    rest = weight.shape[1:]
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *rest)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def unpermute_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo `permute_rope`."""
    rest = weight.shape[1:]
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(weight.shape)
