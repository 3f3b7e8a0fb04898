"""What a GGUF file says of a model's shape, which of its weights llama.cpp has a place for, and what it cannot hold.

Keys: llama.cpp, src/llama-arch.cpp and src/models/.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lexmill.errors import ModelError
from lexmill.formats.gguf import GGUFFile, Value, boolean, f32, string, u32
from lexmill.model.config import ModelConfig
from lexmill.model.directory import ModelDirectory
from lexmill.model.gguf_rope import scaling_metadata
from lexmill.model.names import WeightName, weight_names, weight_shapes

POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}  # llama.h, enum llama_pooling_type
_WRITTEN_POOLING = ("mean", "cls", "last")  # ways to make one vector of a text
_OUTPUT = "output.weight"
ACTIVATION_KEY = (
    "lexmill.activation"  # llama.cpp has the tanh form of GELU compiled in, and GGUF no key for it
)
# Where llama.cpp's name for a family is not Hugging Face's.
_ARCHITECTURES = {"modernbert": "modern-bert"}


def architecture(config: ModelConfig) -> str:
    """The name of a model's family in GGUF's `general.architecture`, and in its keys."""
    return _ARCHITECTURES.get(config.family, config.family)


def require_place(config: ModelConfig, where: str) -> None:
    """Refuse what llama.cpp has no form for, or would compute in another way without a word.

    Raises:
        ModelError: says what.
    """
    scaling = config.rope_scaling
    yarn = scaling is not None and (scaling.beta_fast, scaling.beta_slow) != (32, 1)
    wide = config.heads * config.head_width != config.width
    activations = {True: "gelu_tanh", False: "relu"}
    problems = {
        # YaRN's bounds are compiled in for these; only `llama` divides frequencies by a tensor of the file
        **{
            family: {
                "YaRN with other bounds than 32 and 1": yarn,
                "Llama 3.1's rotary scaling in another family": family != "llama"
                and scaling is not None
                and scaling.kind == "llama3",
                "a width of heads other than width / heads, in this family,": family == "qwen2" and wide,
            }
            for family in ("llama", "qwen2", "qwen3")
        },
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
        # its graph has no place for these, and would leave them out
        "modernbert": {
            "a norm with biases": config.norm_bias,
            "an MLP with biases": config.mlp_bias,
            f"the activation '{config.activation}'": config.activation not in ("gelu", "gelu_tanh", "silu"),
            "heads that are together wider or narrower than the model": wide,
        },
    }
    head = "tells labels apart" if config.labels else "finds answers" if config.span else ""
    if head:  # of an encoder a file holds what embeds texts; without its head this model does nothing
        raise ModelError(
            f"{where}: a GGUF file has no place for the head that {head}.",
            "It runs in transformers: lexmill export hf. For vectors, export the model that it was made from.",
        )
    for problem, present in problems.get(config.family, {}).items():
        if present:
            raise ModelError(
                f"{where}: {problem} fits no model of llama.cpp.",
                "It runs in transformers: lexmill export hf.",
            )


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
    if config.shape == "encoder":
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
    elif config.positions == "rotary":
        shape |= {"rope.dimension_count": u32(config.head_width), "rope.freq_base": f32(config.rope_theta)}
        shape |= scaling_metadata(config.rope_scaling)
    if config.family == "modernbert":
        shape["hidden_activation"] = string(config.activation.removesuffix("_tanh"))
    if config.local_window:
        shape |= {
            "attention.sliding_window": u32(config.local_window),
            "attention.sliding_window_pattern": u32(config.global_every),
            "rope.freq_base_swa": f32(config.local_theta),
        }
    metadata = {f"{architecture(config)}.{key}": value for key, value in shape.items()}
    if config.segments:
        metadata["tokenizer.ggml.token_type_count"] = u32(config.segments)
    if config.shape == "encoder":
        metadata[ACTIVATION_KEY] = string(config.activation)
    return metadata


class HeldTensor(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
        name: in the file.
        shape: in torch's order.
        parts: the weights whose rows lie in it one behind the other; as a rule one.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[WeightName, ...]

    @property
    def stays_f32(self) -> bool:
        """Whether it is float32 in every file."""
        return stays_f32(self.parts[0], self.shape)

    def made_of(self, model: ModelDirectory) -> np.ndarray:
        """What the file holds of a model, float32."""
        parts = [weight_in_gguf(model, name) for name in self.parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def held_tensors(config: ModelConfig) -> list[HeldTensor]:
    """The tensors of a GGUF file, in their order."""
    shapes, parts = weight_shapes(config), dict[str, list[WeightName]]()
    for name in held_weights(config):
        parts.setdefault(name.gguf, []).append(name)
    return [
        HeldTensor(tensor, names[0].whole_shape(shapes[names[0].own]), tuple(names))
        for tensor, names in parts.items()
    ]


def held_weights(config: ModelConfig) -> list[WeightName]:
    """The weights that a GGUF file holds; heads that llama.cpp has no place for are left out.

    llama.cpp never scales what an encoder–decoder gives out, so where the model does, the projection
    is written scaled, and as one of its own where it shares the embedding.
    """
    names = [name for name in weight_names(config) if name.gguf]
    if config.scale_output and config.tied:
        names.append(WeightName("embed.weight", "lm_head.weight", _OUTPUT))
    return names


def read_weight(file: GGUFFile, name: WeightName) -> np.ndarray:
    """What a file holds of a weight, float32: see `weight_in_gguf`.

    Raises:
        FormatError: its tensor is missing, or of a type that cannot be read.
    """
    return name.rows(file.read(name.gguf))


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
