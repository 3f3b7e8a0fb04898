"""What each weight is called here, in Hugging Face's files and in GGUF: one table, read in all directions."""

from __future__ import annotations

from dataclasses import dataclass

from lexmill.model.config import ModelConfig


@dataclass(frozen=True)
class WeightName:
    """One row of the table. `{}` stands for the layer's number.

    `rope` is "q" or "k" for the projections whose rows depend on how a runtime pairs the
    coordinates that rotary positions turn; GGUF's `llama` architecture wants other pairs.
    """

    own: str
    huggingface: str
    gguf: str
    rope: str = ""


_MODEL = [
    WeightName("embed.weight", "model.embed_tokens.weight", "token_embd.weight"),
    WeightName("norm.weight", "model.norm.weight", "output_norm.weight"),
]
_HEAD = WeightName("head.weight", "lm_head.weight", "output.weight")
_BLOCK = [
    ("attention_norm.weight", "input_layernorm.weight", "attn_norm.weight", ""),
    ("attention.q.weight", "self_attn.q_proj.weight", "attn_q.weight", "q"),
    ("attention.k.weight", "self_attn.k_proj.weight", "attn_k.weight", "k"),
    ("attention.v.weight", "self_attn.v_proj.weight", "attn_v.weight", ""),
    ("attention.out.weight", "self_attn.o_proj.weight", "attn_output.weight", ""),
    ("mlp_norm.weight", "post_attention_layernorm.weight", "ffn_norm.weight", ""),
    ("mlp.gate.weight", "mlp.gate_proj.weight", "ffn_gate.weight", ""),
    ("mlp.up.weight", "mlp.up_proj.weight", "ffn_up.weight", ""),
    ("mlp.down.weight", "mlp.down_proj.weight", "ffn_down.weight", ""),
]
_QKV_BIAS = [
    ("attention.q.bias", "self_attn.q_proj.bias", "attn_q.bias", "q"),
    ("attention.k.bias", "self_attn.k_proj.bias", "attn_k.bias", "k"),
    ("attention.v.bias", "self_attn.v_proj.bias", "attn_v.bias", ""),
]
_QK_NORM = [
    ("attention.q_norm.weight", "self_attn.q_norm.weight", "attn_q_norm.weight", ""),
    ("attention.k_norm.weight", "self_attn.k_norm.weight", "attn_k_norm.weight", ""),
]


def weight_names(config: ModelConfig) -> list[WeightName]:
    """Every weight of a model of this shape, in a fixed order; a test proves the table one-to-one."""
    names = [_MODEL[0]]
    block = _BLOCK + (_QKV_BIAS if config.qkv_bias else []) + (_QK_NORM if config.qk_norm else [])
    for layer in range(config.layers):
        for own, huggingface, gguf, rope in block:
            names.append(
                WeightName(
                    f"blocks.{layer}.{own}",
                    f"model.layers.{layer}.{huggingface}",
                    f"blk.{layer}.{gguf}",
                    rope,
                )
            )
    names.append(_MODEL[1])
    return names if config.tied else [*names, _HEAD]


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each weight by its own name, as torch lays it out: (outputs, inputs)."""
    query, key = config.heads * config.head_width, config.kv_heads * config.head_width
    by_ending = {
        "embed.weight": (config.vocab_size, config.width),
        "head.weight": (config.vocab_size, config.width),
        "attention.q.weight": (query, config.width),
        "attention.k.weight": (key, config.width),
        "attention.v.weight": (key, config.width),
        "attention.out.weight": (config.width, query),
        "attention.q.bias": (query,),
        "attention.k.bias": (key,),
        "attention.v.bias": (key,),
        "q_norm.weight": (config.head_width,),
        "k_norm.weight": (config.head_width,),
        "mlp.gate.weight": (config.mlp_width, config.width),
        "mlp.up.weight": (config.mlp_width, config.width),
        "mlp.down.weight": (config.width, config.mlp_width),
    }
    shapes = {}
    for name in weight_names(config):
        ending = next((ending for ending in by_ending if name.own.endswith(ending)), None)
        shapes[name.own] = by_ending[ending] if ending else (config.width,)  # what is left are the norms
    return shapes
