"""Models for transformers: a model directory as a complete Hugging Face directory with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lexmill.errors import FileError, ModelError
from lexmill.files import atomic_directory, atomic_write, read_json, require_space, write_json
from lexmill.formats.safetensors import INDEX_NAME, SINGLE_NAME
from lexmill.model.directory import LINEAGE_FILE, ModelDirectory
from lexmill.tokenizer.special import SpecialIds, generation_config, tokenizer_config

_COPIED = ("config.json", "tokenizer.json", "special_tokens_map.json", LINEAGE_FILE)


def export_huggingface(model: ModelDirectory | Path | str, out: Path | str) -> Path:
    """Copy a model directory to where it will be published, complete, checked, and with a model card.

    A model directory is a Hugging Face directory already; what this adds is the proof that its files
    agree, what one version of transformers wants and another leaves out, and `README.md`.

    Args:
        model: the model directory, or its path.
        out: the new folder. An earlier export there is replaced as a whole.

    Returns:
        `out`.

    Raises:
        ModelError: files that contradict each other; says which.
        FileError: `out` holds something else, or there is no space.
    """
    model = model if isinstance(model, ModelDirectory) else ModelDirectory.open(model)
    out = Path(out)
    _check_target(model, out)
    settings = _checked_settings(model)
    generation = _checked_generation(model)
    weights = _weight_files(model.path)
    require_space(out.parent, int(1.05 * sum(path.stat().st_size for path in weights)), "The exported model")
    with atomic_directory(out) as folder:
        for path in weights:
            shutil.copyfile(path, folder / path.name)
        for name in _COPIED:
            if (model.path / name).is_file():
                shutil.copyfile(model.path / name, folder / name)
        write_json(folder / "tokenizer_config.json", settings)
        write_json(folder / "generation_config.json", generation)
        if model.tokenizer.chat_template:
            with atomic_write(folder / "chat_template.jinja", "w") as file:
                file.write(model.tokenizer.chat_template)
        with atomic_write(folder / "README.md", "w") as file:
            file.write(model_card(model))
        ModelDirectory.open(folder)  # whole, or it does not get its name
    return out


def _check_target(model: ModelDirectory, out: Path) -> None:
    if out.exists() and out.resolve() == model.path.resolve():
        raise FileError(f"{out} is the model itself.", "Choose another folder with --out.")
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(
            f"{out} holds something that is no model, and would be replaced.", "Choose another folder."
        )


def _checked_settings(model: ModelDirectory) -> dict[str, Any]:
    """`tokenizer_config.json` with the template that transformers would use, or an error where two differ."""
    path = model.path / "tokenizer_config.json"
    settings = read_json(path, "tokenizer setting") if path.is_file() else {}
    template = settings.get("chat_template")
    if template and template != model.tokenizer.chat_template:
        raise ModelError(
            f"{model.path}: the chat templates in tokenizer_config.json and chat_template.jinja differ.",
            "Make them the same: some readers look only at one of them.",
        )
    if model.tokenizer.chat_template:
        settings["chat_template"] = model.tokenizer.chat_template
    defaults = tokenizer_config(model.config.context)
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):  # a name that transformers 4 refuses
        settings["tokenizer_class"] = defaults["tokenizer_class"]
    # without it transformers 4 makes token_type_ids, which these models refuse
    settings.setdefault("model_input_names", defaults["model_input_names"])
    return settings


def _checked_generation(model: ModelDirectory) -> dict[str, Any]:
    ids, size = model.tokenizer.ids, model.config.vocab_size
    for name in ("bos", "eos", "pad"):
        token = getattr(ids, name)
        if token is not None and not 0 <= token < size:
            raise ModelError(f"{model.path}: the {name} id {token} is outside the vocabulary of {size:,}.")
    path = model.path / "generation_config.json"
    values = read_json(path, "generation setting") if path.is_file() else generation_config(ids)
    listed, wanted = _id_list(values), set(ids.stop)
    if set(listed) != wanted:
        raise ModelError(
            f"{path}: 'eos_token_id' is {listed}, but the tokenizer ends texts at {sorted(wanted)}.",
            f'Set "eos_token_id": {list(ids.stop)}, or transformers would not stop where the others do.',
        )
    config = read_json(model.path / "config.json", "model configuration")
    if not set(_id_list(config)) <= wanted:
        raise ModelError(
            f"{model.path / 'config.json'}: 'eos_token_id' {_id_list(config)} is not among {sorted(wanted)}."
        )
    return values


def _id_list(values: Mapping[str, Any]) -> list[int]:
    listed = values.get("eos_token_id")
    return listed if isinstance(listed, list) else [] if listed is None else [listed]


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    index = read_json(folder / INDEX_NAME, "weights index")["weight_map"]  # checked when the model was opened
    return [folder / INDEX_NAME, *(folder / name for name in sorted(set(index.values())))]


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


def model_card(model: ModelDirectory) -> str:
    """The text of `README.md`: what the model is, how it was made, how to run it, and where it runs."""
    config, lineage = model.config, model.lineage
    name = str(lineage.get("name") or model.path.resolve().name)
    found = licences(lineage)
    chat = bool(model.tokenizer.chat_template)
    facts = {
        "Architecture": f"{config.family}, a decoder",
        "Parameters": f"{config.parameters:,}",
        "Layers, width": f"{config.layers}, {config.width}",
        "Attention heads": f"{config.heads} of width {config.head_width}, {config.kv_heads} for keys",
        "Context": f"{config.context:,} tokens",
        "Vocabulary": f"{config.vocab_size:,} tokens",
        "Output": "shares the embedding" if config.tied else "has its own matrix",
        "Licence of the data": ", ".join(found) or "not recorded",
    }
    made = {key: value for key, value in _flat(lineage) if not key.startswith("scores")}
    scores = dict(_flat(lineage.get("scores") or {}))
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lexmill", config.family],
    }
    if len(found) == 1:
        header = {"license": found[0].lower(), **header}
    parts = [
        # YAML reads JSON: no quoting rules to get wrong
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in header.items()) + "---",
        f"# {_cell(name)}",
        f"A language model of {config.parameters:,} weights, made with lexmill.",
        _table("Fact", facts),
        *(["## Scores", _table("Score", scores)] if scores else []),
        *(["## How it was made", _table("Lineage", made)] if made else []),
        "## How to run it",
        _snippet(model.tokenizer.ids, name, chat),
        "## Where it runs",
        "| runtime | works |\n|---|---|\n"
        "| transformers | yes, from this directory |\n"
        "| llama.cpp | yes, exported to GGUF (f32, f16, bf16, q8_0) |\n"
        f"| Ollama | {'yes, from the GGUF file with its Modelfile' if chat else 'yes, from the GGUF file'} |",
        "`lexmill verify` compares the answers of transformers and llama.cpp with lexmill's own.",
    ]
    return "\n\n".join(parts) + "\n"


def _snippet(ids: SpecialIds, name: str, chat: bool) -> str:
    ask = (
        'messages = [{"role": "user", "content": "Hello!"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")\n"
        if chat
        else 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
    )
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'path = "."  # this directory\n'
        "tokenizer = AutoTokenizer.from_pretrained(path)\n"
        "model = AutoModelForCausalLM.from_pretrained(path)\n"
        f"{ask}"
        "output = model.generate(**inputs, max_new_tokens=100)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
        "```"
    )


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
