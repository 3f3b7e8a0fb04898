"""The model card, `README.md`: what a model is, how it was made, how to run it, and where it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lexmill.model.config import ModelConfig
from lexmill.model.directory import DATA_CARD, ModelDirectory


def licences(lineage: Any) -> list[str]:
    """The licences of the data and the model that a lineage names, wherever in it."""

    def find(value: Any, wanted: bool) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from find(item, str(key) in ("license", "licenses", "licence", "licences"))
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from find(item, wanted)
        elif wanted and isinstance(value, str) and value:
            yield value

    return list(dict.fromkeys(find(lineage, False)))


def model_card(model: ModelDirectory, lineage: Mapping[str, Any] | None = None) -> str:
    """The text of `README.md`: what the model is, how it was made, how to run it, and where it runs.

    Args:
        lineage: if it is to be another than the directory's own.
    """
    config, lineage = model.config, model.lineage if lineage is None else lineage
    name = str(lineage.get("name") or model.path.resolve().name)
    found = licences(lineage)
    chat = model.has_tokenizer and bool(model.tokenizer.chat_template)
    kind = {"decoder": "a decoder", "encoder": "an encoder", "encoder_decoder": "an encoder–decoder"}
    facts = {
        "Architecture": f"{config.family}, {kind[config.shape]}",
        "Parameters": f"{config.parameters:,}",
        "Layers, width": f"{_layers(config)}, {config.width}",
        "Attention heads": f"{config.heads} of width {config.head_width}, {config.kv_heads} for keys",
        "Context": f"{config.context:,} tokens",
        "Vocabulary": f"{config.vocab_size:,} tokens",
        "Output": "shares the embedding" if config.tied else "has its own matrix",
        "Licence of the data": ", ".join(found) or "not recorded",
    }
    made = {key: value for key, value in _flat(lineage) if not key.startswith(("scores", "gguf."))}
    with_data = (model.path / DATA_CARD).is_file()
    scores = dict(_flat(lineage.get("scores") or {}))
    sentences = _pipeline(config) == "sentence-similarity"
    header = {
        "library_name": "sentence-transformers" if sentences else "transformers",
        "pipeline_tag": _pipeline(config),
        "tags": ["lexmill", config.family],
    }
    if len(found) == 1:
        header = {"license": found[0].lower(), **header}
    parts = [
        # YAML reads JSON: no quoting rules to get wrong
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in header.items()) + "---",
        f"# {_cell(name)}",
        f"A language model of {config.parameters:,} weights, "
        f"{'imported' if lineage.get('imported') else 'made'} with lexmill.",
        _table("Fact", facts),
        *(["## Scores", _table("Score", scores)] if scores else []),
        *(["## How it was made", _table("Lineage", made)] if made else []),
        *(["## Data", f"What it learned from: [{DATA_CARD}]({DATA_CARD})."] if with_data else []),
        "## How to run it",
        _snippet(model, chat),
        "## Where it runs",
        _where(config, chat),
        "`lexmill verify` compares their answers with lexmill's own.",
    ]
    return "\n\n".join(parts) + "\n"


def _layers(config: ModelConfig) -> str:
    return f"{config.layers} + {config.decoder_layers}" if config.decoder_layers else str(config.layers)


def _pipeline(config: ModelConfig) -> str:
    if config.shape == "encoder":
        if config.labels or config.span:
            return "text-classification" if config.labels else "question-answering"
        return "fill-mask" if config.mlm else "sentence-similarity"
    return "text-generation" if config.shape == "decoder" else "text2text-generation"


def _where(config: ModelConfig, chat: bool) -> str:
    rows = {"transformers": "yes, from this directory"}
    if config.shape == "decoder":
        rows["llama.cpp"] = "yes, exported to GGUF (f32, f16, bf16, and quantised from q8_0 to q4_0)"
        rows["Ollama"] = "yes, from the GGUF file with its Modelfile" if chat else "yes, from the GGUF file"
    elif config.labels or config.span:
        rows["llama.cpp"] = rows["Ollama"] = "not exported: no place for its head"
    elif config.shape == "encoder":
        rows["llama.cpp"] = "embeddings only, exported to GGUF; it has no place for the heads"
        rows["Ollama"] = "embeddings only, from the GGUF file"
    else:
        rows["llama.cpp"] = "its library, exported to GGUF; its server cannot load this shape"
        rows["Ollama"] = "not exported"
    return "\n".join(["| runtime | works |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _snippet(model: ModelDirectory, chat: bool) -> str:
    """A program that runs the model in transformers."""
    auto, ask, show = (_encoder_lines if model.config.shape == "encoder" else _writer_lines)(model, chat)
    return (
        "```python\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        'path = "."  # this directory\n'
        "tokenizer = AutoTokenizer.from_pretrained(path)\n"
        f"model = {auto}.from_pretrained(path)\n"
        f"{ask}{show}"
        "```"
    )


def _writer_lines(model: ModelDirectory, chat: bool) -> tuple[str, str, str]:
    ask = (
        'messages = [{"role": "user", "content": "Hello!"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")\n"
        if chat
        else 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
    )
    decoder = model.config.shape == "decoder"
    begin = 'inputs["input_ids"].shape[1]' if decoder else "1"
    show = (
        "output = model.generate(**inputs, max_new_tokens=100)\n"
        f"print(tokenizer.decode(output[0, {begin} :], skip_special_tokens=True))\n"
    )
    return "AutoModelForCausalLM" if decoder else "AutoModelForSeq2SeqLM", ask, show


def _encoder_lines(model: ModelDirectory, chat: bool) -> tuple[str, str, str]:
    if model.config.labels:
        ask = 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        show = "best = int(model(**inputs).logits.argmax())\nprint(model.config.id2label[best])\n"
        return "AutoModelForSequenceClassification", ask, show
    if model.config.span:
        ask = 'inputs = tokenizer("Who came?", "Once upon a time Anne came.", return_tensors="pt")\n'
        show = (
            "out = model(**inputs)\n"
            "begin, end = int(out.start_logits.argmax()), int(out.end_logits.argmax())\n"
            'print(tokenizer.decode(inputs["input_ids"][0, begin : end + 1]))\n'
        )
        return "AutoModelForQuestionAnswering", ask, show
    mask = model.tokenizer.ids.mask if model.has_tokenizer and model.config.mlm else None
    if mask is None:
        ask = 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        return "AutoModel", ask, "print(model(**inputs).last_hidden_state.mean(1))\n"
    ask = f'inputs = tokenizer("Once upon a {model.tokenizer.token_text(mask)}", return_tensors="pt")\n'
    show = (
        f'place = (inputs["input_ids"][0] == {mask}).nonzero()[0, 0]\n'
        "best = model(**inputs).logits[0, place].topk(5).indices\n"
        "print([tokenizer.decode([token]) for token in best])\n"
    )
    return "AutoModelForMaskedLM", ask, show


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Nested tables as dotted keys; lists of plain values on one line."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        for number, item in enumerate(value):
            yield from _flat(item, f"{key}[{number}]")
    elif isinstance(value, list):
        yield key, ", ".join(map(str, value))
    elif value is not None:
        yield key, f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(title: str, rows: Mapping[str, str]) -> str:
    lines = [
        f"| {title} | |",
        "|---|---|",
        *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()),
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
