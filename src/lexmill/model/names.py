"""What each weight is called here, in Hugging Face's files and in GGUF: one table a family, read in all directions."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np

from lexmill.model.config import ModelConfig


@dataclass(frozen=True)
class WeightName:
    """One row of a table.

    `rope` is "q" or "k" for the projections whose rows depend on how a runtime pairs the
    coordinates that rotary positions turn; GGUF's `llama` architecture wants other pairs.
    `gguf` is "" where llama.cpp has no place for the weight. `part` is (index, of) where files
    hold several of our matrices, of one shape, as one: rows behind rows.
    """

    own: str
    huggingface: str
    gguf: str
    rope: str = ""
    part: tuple[int, int] = (0, 1)

    def rows(self, whole: np.ndarray) -> np.ndarray:
        """This weight's rows of the matrix in a file."""
        index, of = self.part
        size = len(whole) // of
        return whole[index * size : (index + 1) * size]

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the matrix in a file, of which this weight has `shape`."""
        return (shape[0] * self.part[1], *shape[1:])


def _linear(own: str, huggingface: str, gguf: str, bias: bool, rope: str = "") -> list[WeightName]:
    """A linear layer or norm: its weight, and its bias where it has one."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [
        WeightName(f"{own}.{kind}", f"{huggingface}.{kind}", gguf and f"{gguf}.{kind}", rope)
        for kind in kinds
    ]


def _decoder(config: ModelConfig) -> Iterator[WeightName]:
    """Llama, Qwen2, Qwen3."""
    yield WeightName("embed.weight", "model.embed_tokens.weight", "token_embd.weight")
    for layer in range(config.layers):
        block = [
            *_linear("attention_norm", "input_layernorm", "attn_norm", False),
            *_linear("attention.q", "self_attn.q_proj", "attn_q", config.qkv_bias, "q"),
            *_linear("attention.k", "self_attn.k_proj", "attn_k", config.qkv_bias, "k"),
            *_linear("attention.v", "self_attn.v_proj", "attn_v", config.qkv_bias),
            *_linear("attention.out", "self_attn.o_proj", "attn_output", False),
            *_linear("mlp_norm", "post_attention_layernorm", "ffn_norm", False),
            *_linear("mlp.gate", "mlp.gate_proj", "ffn_gate", False),
            *_linear("mlp.up", "mlp.up_proj", "ffn_up", False),
            *_linear("mlp.down", "mlp.down_proj", "ffn_down", False),
        ]
        if config.qk_norm:
            block += _linear("attention.q_norm", "self_attn.q_norm", "attn_q_norm", False)
            block += _linear("attention.k_norm", "self_attn.k_norm", "attn_k_norm", False)
        yield from _placed(block, f"decoder.blocks.{layer}", f"model.layers.{layer}", f"blk.{layer}")
    yield WeightName("decoder.norm.weight", "model.norm.weight", "output_norm.weight")
    if not config.tied:
        yield WeightName("head.weight", "lm_head.weight", "output.weight")


def _bert(config: ModelConfig) -> Iterator[WeightName]:
    """BERT; with a head, everything below it has the prefix `bert.`."""
    body = [
        WeightName("embed.weight", "embeddings.word_embeddings.weight", "token_embd.weight"),
        WeightName("position_embed.weight", "embeddings.position_embeddings.weight", "position_embd.weight"),
    ]
    if config.segments:
        body.append(
            WeightName(
                "segment_embed.weight", "embeddings.token_type_embeddings.weight", "token_types.weight"
            )
        )
    body += _linear("embed_norm", "embeddings.LayerNorm", "token_embd_norm", True)
    for layer in range(config.layers):
        block = [
            *_linear("attention.q", "attention.self.query", "attn_q", True),
            *_linear("attention.k", "attention.self.key", "attn_k", True),
            *_linear("attention.v", "attention.self.value", "attn_v", True),
            *_linear("attention.out", "attention.output.dense", "attn_output", True),
            *_linear("attention_norm", "attention.output.LayerNorm", "attn_output_norm", True),
            *_linear("mlp.up", "intermediate.dense", "ffn_up", True),
            *_linear("mlp.down", "output.dense", "ffn_down", True),
            *_linear("mlp_norm", "output.LayerNorm", "layer_output_norm", True),
        ]
        body += _placed(block, f"encoder.blocks.{layer}", f"encoder.layer.{layer}", f"blk.{layer}")
    if config.pooler:
        body += _linear("pooler", "pooler.dense", "", True)
    headed = config.mlm or config.nsp or config.labels or config.span
    prefix = "bert." if headed else ""
    yield from (replace(name, huggingface=prefix + name.huggingface) for name in body)
    if config.mlm:
        yield from _linear("mlm.dense", "cls.predictions.transform.dense", "", True)
        yield from _linear("mlm.norm", "cls.predictions.transform.LayerNorm", "", True)
        # a projection of its own has a bias of its own, and transformers leaves the other one unused
        own = "" if config.tied else "decoder."
        yield WeightName("mlm.bias", f"cls.predictions.{own}bias", "")
        if not config.tied:
            yield WeightName("head.weight", "cls.predictions.decoder.weight", "")
    if config.nsp:
        yield from _linear("nsp", "cls.seq_relationship", "", True)
    if config.labels:
        yield from _linear("label", "classifier", "", True)
    if config.span:
        yield from _linear("span", "qa_outputs", "", True)


def _modernbert(config: ModelConfig) -> Iterator[WeightName]:
    """ModernBERT; the first layer has no norm before attention, because the embeddings have one."""
    norm, mlp = config.norm_bias, config.mlp_bias
    body = [WeightName("embed.weight", "embeddings.tok_embeddings.weight", "token_embd.weight")]
    body += _linear("embed_norm", "embeddings.norm", "token_embd_norm", norm)
    for layer in range(config.layers):
        block = [] if layer == 0 else _linear("attention_norm", "attn_norm", "attn_norm", norm)
        block += _fused(("attention.q", "attention.k", "attention.v"), "attn.Wqkv", "attn_qkv", False)
        block += _linear("attention.out", "attn.Wo", "attn_output", False)
        block += _linear("mlp_norm", "mlp_norm", "ffn_norm", norm)
        block += _fused(("mlp.gate", "mlp.up"), "mlp.Wi", "ffn_up", mlp)
        block += _linear("mlp.down", "mlp.Wo", "ffn_down", mlp)
        body += _placed(block, f"encoder.blocks.{layer}", f"layers.{layer}", f"blk.{layer}")
    body += _linear("encoder.norm", "final_norm", "output_norm", norm)
    prefix = "model." if config.mlm or config.labels or config.span else ""
    yield from (replace(name, huggingface=prefix + name.huggingface) for name in body)
    if config.labels or config.span:
        yield from _linear("transform.dense", "head.dense", "", config.mlm_bias)
        yield from _linear("transform.norm", "head.norm", "", norm)
        yield from _linear("label" if config.labels else "span", "classifier", "", True)
    if config.mlm:
        yield from _linear("mlm.dense", "head.dense", "", config.mlm_bias)
        yield from _linear("mlm.norm", "head.norm", "", norm)
        yield WeightName("mlm.bias", "decoder.bias", "")
        if not config.tied:
            yield WeightName("head.weight", "decoder.weight", "")


def _t5(config: ModelConfig) -> Iterator[WeightName]:
    """T5; the position biases of the first layer serve all."""
    yield WeightName("embed.weight", "shared.weight", "token_embd.weight")
    for side, layers, short in (("encoder", config.layers, "enc"), ("decoder", config.decoder_layers, "dec")):
        yield WeightName(
            f"{side}.relative.weight",
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            f"{short}.blk.0.attn_rel_b.weight",
        )
        for layer in range(layers):
            block = _linear("attention_norm", "layer.0.layer_norm", "attn_norm", False)
            block += _t5_attention("attention", "layer.0.SelfAttention", "attn")
            if side == "decoder":
                block += _linear("cross_norm", "layer.1.layer_norm", "cross_attn_norm", False)
                block += _t5_attention("cross", "layer.1.EncDecAttention", "cross_attn")
            place = "layer.2" if side == "decoder" else "layer.1"
            block += _linear("mlp_norm", f"{place}.layer_norm", "ffn_norm", False)
            up = "wi_1" if config.gated else "wi"
            if config.gated:
                block += _linear("mlp.gate", f"{place}.DenseReluDense.wi_0", "ffn_gate", False)
            block += _linear("mlp.up", f"{place}.DenseReluDense.{up}", "ffn_up", False)
            block += _linear("mlp.down", f"{place}.DenseReluDense.wo", "ffn_down", False)
            yield from _placed(
                block, f"{side}.blocks.{layer}", f"{side}.block.{layer}", f"{short}.blk.{layer}"
            )
        yield WeightName(
            f"{side}.norm.weight", f"{side}.final_layer_norm.weight", f"{short}.output_norm.weight"
        )
    if not config.tied:
        yield WeightName("head.weight", "lm_head.weight", "output.weight")


def _t5_attention(own: str, huggingface: str, gguf: str) -> list[WeightName]:
    return [
        name
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
        for name in _linear(f"{own}.{ours}", f"{huggingface}.{theirs}", f"{gguf}_{theirs}", False)
    ]


def _fused(owns: tuple[str, ...], huggingface: str, gguf: str, bias: bool) -> list[WeightName]:
    return [
        replace(name, part=(index, len(owns)))
        for index, own in enumerate(owns)
        for name in _linear(own, huggingface, gguf, bias)
    ]


def _placed(block: list[WeightName], own: str, huggingface: str, gguf: str) -> Iterator[WeightName]:
    for name in block:
        yield replace(
            name,
            own=f"{own}.{name.own}",
            huggingface=f"{huggingface}.{name.huggingface}",
            gguf=f"{gguf}.{name.gguf}",
        )


_TABLES = {
    "llama": _decoder,
    "qwen2": _decoder,
    "qwen3": _decoder,
    "bert": _bert,
    "modernbert": _modernbert,
    "t5": _t5,
}


def weight_names(config: ModelConfig) -> list[WeightName]:
    """Every weight of a model of this shape, in a fixed order; a test proves the table total and one-to-one."""
    return list(_TABLES[config.family](config))


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each weight by its own name, as torch lays it out: (outputs, inputs)."""
    query, key, width = config.heads * config.head_width, config.kv_heads * config.head_width, config.width
    by_ending = {
        "attention.q": (query, width),
        "attention.k": (key, width),
        "attention.v": (key, width),
        "attention.out": (width, query),
        "cross.q": (query, width),
        "cross.k": (key, width),
        "cross.v": (key, width),
        "cross.out": (width, query),
        "q_norm": (config.head_width,),
        "k_norm": (config.head_width,),
        "mlp.gate": (config.mlp_width, width),
        "mlp.up": (config.mlp_width, width),
        "mlp.down": (width, config.mlp_width),
        "position_embed": (config.context, width),
        "segment_embed": (config.segments, width),
        "relative": (config.relative_buckets, config.heads),
        "mlm.dense": (width, width),
        "pooler": (width, width),
        "nsp": (2, width),
        "transform.dense": (width, width),
        "label": (len(config.labels), width),
        "span": (2, width),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name in weight_names(config):
        place, _, kind = name.own.rpartition(".")
        if place in ("embed", "head"):
            shapes[name.own] = (config.vocab_size, width)
        elif name.own == "mlm.bias":
            shapes[name.own] = (config.vocab_size,)
        else:
            ending = next((ending for ending in by_ending if f".{place}".endswith(f".{ending}")), None)
            shape = by_ending[ending] if ending else (width,)  # what is left are the norms
            shapes[name.own] = shape if kind == "weight" else shape[:1]
    return shapes


def find_name(name: WeightName, present: Collection[str]) -> str | None:
    """What a file calls this weight: by the table, or as older and other tools write it; None if it is absent.

    Some keep or drop the prefix of the model below the head, and the first BERTs call a norm's
    weight and bias gamma and beta.
    """
    bare = name.huggingface.removeprefix("bert.").removeprefix("model.")
    for spelling in (name.huggingface, bare, f"bert.{bare}", f"model.{bare}"):
        old = spelling.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )
        for candidate in (spelling, old):
            if candidate in present:
                return candidate
    return None


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer as Hugging Face names it, and what it is here.

    Attributes:
        huggingface: the path of the module in transformers' model, e.g. "model.layers.0.self_attn.q_proj".
        owns: our modules; several where transformers holds them as one, rows behind rows.
        rows: outputs of each.
        inputs: of all.
        rope: as in `WeightName`.
        gguf: the name of the weight in a GGUF file, "" where llama.cpp has no place for it.
    """

    huggingface: str
    owns: tuple[str, ...]
    rows: tuple[int, ...]
    inputs: int
    rope: str = ""
    gguf: str = ""

    @property
    def outputs(self) -> int:
        return sum(self.rows)


def matrices_in_blocks(config: ModelConfig) -> frozenset[str]:
    """Our names of the weights of linear layers inside blocks: what may be kept in few bits."""
    layers = linear_layers(config)
    return frozenset(f"{own}.weight" for layer in layers for own in layer.owns if ".blocks." in own)


# Weights that are looked up, not multiplied.
_LOOKED_UP = ("embed.weight", "relative.weight")


def linear_layers(config: ModelConfig) -> list[LinearLayer]:
    """Every linear layer of a model of this shape, in the order of the table; a tied head is none."""
    shapes = weight_shapes(config)
    found: dict[str, list[WeightName]] = {}
    for name in weight_names(config):
        if len(shapes[name.own]) == 2 and not name.own.endswith(_LOOKED_UP):
            found.setdefault(name.huggingface.removesuffix(".weight"), []).append(name)
    return [
        LinearLayer(
            module,
            tuple(name.own.removesuffix(".weight") for name in names),
            tuple(shapes[name.own][0] for name in names),
            shapes[names[0].own][1],
            names[0].rope,
            names[0].gguf,
        )
        for module, names in found.items()
    ]
