"""A model's shape as Hugging Face's `config.json`, both ways; one pair of functions a kind of model. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lexmill.errors import ConfigError, ModelError
from lexmill.model.config import FAMILIES, ModelConfig
from lexmill.model.huggingface_heads import read_labels, refuse_other_heads, write_labels
from lexmill.model.huggingface_rope import read_plain, read_scaling, read_theta, write_scaling
from lexmill.model.huggingface_values import ACTIVATIONS, Values

_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


def read_config(values: Mapping[str, Any], where: str, weights: Collection[str] = ()) -> ModelConfig:
    """See `ModelConfig.from_huggingface`."""
    reader = Values(values, where)
    family = reader.get("model_type", str)
    if family not in _READERS:
        raise ModelError(
            f"{where}: the model type '{family}' is not supported.", f"Supported are {', '.join(_READERS)}."
        )
    try:
        return ModelConfig(**FAMILIES[family], **_READERS[family](reader, family, weights))
    except ConfigError as error:
        raise ModelError(f"{where}: {error.message}", error.hint) from error


def write_config(config: ModelConfig) -> dict[str, Any]:
    """See `ModelConfig.to_huggingface`."""
    return _WRITERS[config.family](config)


def _read_decoder(reader: Values, family: str, weights: Collection[str]) -> dict[str, Any]:
    get, rope = reader.get, reader.rope()
    heads, width = get("num_attention_heads", int), get("hidden_size", int)
    reader.refuse(
        {
            "the activation '" + str(reader.values.get("hidden_act")) + "'": reader.activation(
                "hidden_act", "silu"
            )
            != "silu",
            "biases in attention": bool(reader.values.get("attention_bias")) and family != "qwen2",
            "biases in the MLP": bool(reader.values.get("mlp_bias")),
            "sliding-window attention": bool(reader.values.get("use_sliding_window")),
        }
    )
    context = get("max_position_embeddings", int, 2048)
    return {
        "vocab_size": get("vocab_size", int),
        "width": width,
        "layers": get("num_hidden_layers", int),
        "heads": heads,
        "kv_heads": get("num_key_value_heads", int, heads),
        "head_width": get("head_dim", int, width // max(heads, 1)),
        "mlp_width": get("intermediate_size", int),
        "context": context,
        "rope_theta": read_theta(reader, rope),
        "rope_scaling": read_scaling(reader, rope, context),
        "norm_eps": get("rms_norm_eps", float, 1e-6),
        "tied": get("tie_word_embeddings", bool, False),
        "dropout": 0.0,
    }


def _write_decoder(config: ModelConfig) -> dict[str, Any]:
    family = config.family
    rope = write_scaling(config.rope_scaling)
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    values: dict[str, Any] = {
        "architectures": [architecture[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        # transformers 4 reads the first form, with "rope_scaling" where there is one, 5 the last
        "rope_theta": config.rope_theta,
        **({"rope_scaling": rope} if config.rope_scaling else {}),
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
    }
    if family == "llama":
        return values | {"attention_bias": False, "mlp_bias": False}
    return values | {"use_sliding_window": False} | ({"attention_bias": False} if family == "qwen3" else {})


def _read_bert(reader: Values, family: str, weights: Collection[str]) -> dict[str, Any]:
    get = reader.get
    heads, width = get("num_attention_heads", int), get("hidden_size", int)
    kind = reader.values.get("position_embedding_type") or "absolute"
    reader.refuse(
        {
            f"positions of the kind '{kind}'": kind != "absolute",
            "BERT as a decoder": bool(reader.values.get("is_decoder")),
            "cross-attention in BERT": bool(reader.values.get("add_cross_attention")),
        }
    )
    architectures = reader.values.get("architectures") or []

    def has(part: str, *made_by: str) -> bool:
        if weights:
            return any(part in name for name in weights)
        return any(name in made_by for name in architectures)

    pretraining, masked, pair = "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction"
    labelled, spans = "BertForSequenceClassification", "BertForQuestionAnswering"
    classifies = has("classifier.", labelled)
    refuse_other_heads(reader, has("classifier.", labelled) or has("qa_outputs.", spans), (labelled, spans))
    return {
        "vocab_size": get("vocab_size", int),
        "width": width,
        "layers": get("num_hidden_layers", int),
        "heads": heads,
        "kv_heads": heads,
        "head_width": width // max(heads, 1),
        "mlp_width": get("intermediate_size", int),
        "context": get("max_position_embeddings", int, 512),
        "norm_eps": get("layer_norm_eps", float, 1e-12),
        "activation": reader.activation("hidden_act", "gelu"),
        "segments": get("type_vocab_size", int, 2),
        "tied": get("tie_word_embeddings", bool, True),
        "mlm": has("cls.predictions.", pretraining, masked),
        "mlm_bias": has("cls.predictions.", pretraining, masked),
        "pooler": has("pooler.dense.", pretraining, pair, labelled, "BertModel")
        # an old file may hold one, but this class does not use it
        and not has("qa_outputs.", spans),
        "nsp": has("cls.seq_relationship.", pretraining, pair),
        "labels": read_labels(reader) if classifies else (),
        "span": has("qa_outputs.", spans),
        "dropout": get("hidden_dropout_prob", float, 0.1),
    }


def _write_bert(config: ModelConfig) -> dict[str, Any]:
    architecture = (
        "BertForPreTraining"
        if config.mlm and config.nsp
        else "BertForMaskedLM"
        if config.mlm
        else "BertForNextSentencePrediction"
        if config.nsp
        else "BertForSequenceClassification"
        if config.labels
        else "BertForQuestionAnswering"
        if config.span
        else "BertModel"
    )
    return {
        "architectures": [architecture],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": _ACTIVATION_NAMES[config.activation],
        "max_position_embeddings": config.context,
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.segments,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": config.tied,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "is_decoder": False,
        **write_labels(config),
    }


def _read_modernbert(reader: Values, family: str, weights: Collection[str]) -> dict[str, Any]:
    get = reader.get
    heads, width, layers = (
        get(key, int) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    rope = reader.rope()
    tables = {kind: rope.get(kind) or {} for kind in ("full_attention", "sliding_attention")}
    theta = read_plain(reader, tables["full_attention"]) or get("global_rope_theta", float, 160000.0)
    local_theta = read_plain(reader, tables["sliding_attention"]) or get("local_rope_theta", float, 10000.0)
    every, window = _layer_pattern(reader, layers)
    task = _modern_task(reader, weights)
    masked, judged = task == "mlm", task in ("labels", "span")
    reader.refuse(
        {
            "another activation in the head": (masked or judged)
            and reader.activation("classifier_activation", "gelu")
            != reader.activation("hidden_activation", "gelu"),
            "a head without a bias on its outputs": masked and not get("decoder_bias", bool, True),
        }
    )
    return {
        "vocab_size": get("vocab_size", int),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads,
        "head_width": width // max(heads, 1),
        "mlp_width": get("intermediate_size", int),
        "context": get("max_position_embeddings", int, 8192),
        "rope_theta": theta,
        "local_theta": local_theta,
        "local_window": window,
        "global_every": every,
        "norm_eps": get("norm_eps", float, 1e-5),
        "norm_bias": get("norm_bias", bool, False),
        "activation": reader.activation("hidden_activation", "gelu"),
        **_modern_biases(reader),
        "tied": get("tie_word_embeddings", bool, True),
        "mlm": masked,
        "mlm_bias": (masked or judged) and get("classifier_bias", bool, False),
        "labels": read_labels(reader) if task == "labels" else (),
        "label_pooling": get("classifier_pooling", str, "cls"),
        "span": task == "span",
        "dropout": get("mlp_dropout", float, 0.0),
    }


def _modern_task(reader: Values, weights: Collection[str]) -> str:
    """Which head a model has: "mlm", "labels", "span" or ""."""
    tasks = {
        "ModernBertForSequenceClassification": "labels",
        "ModernBertForQuestionAnswering": "span",
    }
    named = [tasks[name] for name in reader.values.get("architectures") or [] if name in tasks]
    if any(name.startswith("classifier.") for name in weights):
        refuse_other_heads(reader, True, tuple(tasks))
        return named[0] if named else "labels"
    if named and not weights:
        return named[0]
    return "mlm" if not weights or any(name.startswith(("decoder.", "head.")) for name in weights) else ""


def _modern_biases(reader: Values) -> dict[str, bool]:
    reader.refuse({"biases in attention": reader.get("attention_bias", bool, False)})
    return {"mlp_bias": reader.get("mlp_bias", bool, False)}


def _layer_pattern(reader: Values, layers: int) -> tuple[int, int]:
    """Every how many layers one sees all, and the window of the others (0: there are no others)."""
    types = reader.values.get("layer_types")
    every = reader.get("global_attn_every_n_layers", int, 3)
    window = reader.get("local_attention", int, 128)
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise ModelError(f"{reader.where}: 'layer_types' should name {layers:,} layers.")
        local = [kind == "sliding_attention" for kind in types]
        if not any(local):
            return 3, 0
        found = global_period(local)
        if found is None:
            raise ModelError(f"{reader.where}: this order of local and global layers is not supported.")
        every = found
    return every, window


def global_period(local: Sequence[bool]) -> int | None:
    """Every how many layers, from the first, one is not local; None where they keep no such order."""
    following = [index for index, small in enumerate(local) if not small and index]
    every = following[0] if following else max(len(local), 1)
    return every if list(local) == [bool(index % every) for index in range(len(local))] else None


def _write_modernbert(config: ModelConfig) -> dict[str, Any]:
    full, local = (
        {"rope_type": "default", "rope_theta": theta} for theta in (config.rope_theta, config.local_theta)
    )
    return {
        "architectures": [
            "ModernBertForMaskedLM"
            if config.mlm
            else "ModernBertForSequenceClassification"
            if config.labels
            else "ModernBertForQuestionAnswering"
            if config.span
            else "ModernBertModel"
        ],
        "model_type": "modernbert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_activation": _ACTIVATION_NAMES[config.activation],
        "classifier_activation": _ACTIVATION_NAMES[config.activation],
        "max_position_embeddings": config.context,
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "classifier_bias": config.mlm_bias,
        "decoder_bias": True,
        "local_attention": config.local_window or 2 * config.context,
        # transformers 4 reads the first three, 5 the other two
        "global_attn_every_n_layers": config.global_every if config.local_window else 1,
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": config.local_theta,
        "layer_types": [
            "sliding_attention" if config.is_local(layer) else "full_attention"
            for layer in range(config.layers)
        ],
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "tie_word_embeddings": config.tied,
        "embedding_dropout": config.dropout,
        "mlp_dropout": config.dropout,
        "attention_dropout": config.dropout,
        "classifier_dropout": config.dropout,
        "classifier_pooling": config.label_pooling,
        **write_labels(config),
    }


def _read_t5(reader: Values, family: str, weights: Collection[str]) -> dict[str, Any]:
    get = reader.get
    layers, projection = get("num_layers", int), get("feed_forward_proj", str, "relu")
    gated, _, name = projection.rpartition("-")
    if name not in ACTIVATIONS or gated not in ("", "gated"):
        raise ModelError(f"{reader.where}: the MLP '{projection}' is not supported yet.")
    # "gated-gelu" has always meant the tanh form (transformers, configuration_t5.py)
    activation = "gelu_tanh" if projection == "gated-gelu" else ACTIVATIONS[name]
    tied = get("tie_word_embeddings", bool, True)
    return {
        "vocab_size": get("vocab_size", int),
        "width": get("d_model", int),
        "layers": layers,
        "decoder_layers": get("num_decoder_layers", int, layers),
        "heads": get("num_heads", int),
        "kv_heads": get("num_heads", int),
        "head_width": get("d_kv", int),
        "mlp_width": get("d_ff", int),
        "context": get("n_positions", int, 512),
        "decoder_start": get("decoder_start_token_id", int, get("pad_token_id", int, 0)),
        "relative_buckets": get("relative_attention_num_buckets", int, 32),
        "relative_distance": get("relative_attention_max_distance", int, 128),
        "norm_eps": get("layer_norm_epsilon", float, 1e-6),
        "activation": activation,
        "gated": bool(gated),
        "tied": "lm_head.weight" not in weights if weights else tied,
        # transformers 5 remembers by this key what 4 told from tie_word_embeddings
        "scale_output": get("scale_decoder_outputs", bool, tied),
        "dropout": get("dropout_rate", float, 0.1),
    }


def _write_t5(config: ModelConfig) -> dict[str, Any]:
    activation = _ACTIVATION_NAMES[config.activation]
    # "gated-gelu" is the tanh form; the exact one needs its other name
    gated = {"gelu_new": "gelu", "gelu": "gelu_python"}.get(activation, activation)
    projection = f"gated-{gated}" if config.gated else activation
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "num_layers": config.layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.heads,
        "n_positions": config.context,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": projection,
        "dense_act_fn": activation,
        "is_gated_act": config.gated,
        "is_encoder_decoder": True,
        "decoder_start_token_id": config.decoder_start,
        # false means to both versions: do not scale the decoder's outputs
        "tie_word_embeddings": config.scale_output,
        "scale_decoder_outputs": config.scale_output,
        "dropout_rate": config.dropout,
    }


_READERS: dict[str, Callable[[Values, str, Collection[str]], dict[str, Any]]] = {
    "llama": _read_decoder,
    "qwen2": _read_decoder,
    "qwen3": _read_decoder,
    "bert": _read_bert,
    "modernbert": _read_modernbert,
    "t5": _read_t5,
}
_WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "llama": _write_decoder,
    "qwen2": _write_decoder,
    "qwen3": _write_decoder,
    "bert": _write_bert,
    "modernbert": _write_modernbert,
    "t5": _write_t5,
}
