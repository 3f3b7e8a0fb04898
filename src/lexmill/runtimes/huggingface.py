"""Models for transformers: a model directory as a complete Hugging Face directory with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.errors import FileError, ModelError
from lexmill.files import atomic_directory, atomic_write, read_json, require_space, write_json
from lexmill.formats.safetensors import INDEX_NAME, SINGLE_NAME
from lexmill.formats.safetensors_writing import SHARD_BYTES, write_shards
from lexmill.model.directory import DATA_CARD, DTYPE_NAMES, LINEAGE_FILE, ModelDirectory
from lexmill.model.sentence_files import SENTENCE_FILES, module_folders, write_sentence_files
from lexmill.runtimes.model_card import model_card
from lexmill.tokenizer.loading import FILE_NAMES
from lexmill.tokenizer.special import generation_config

# A tokenizer of whatever form: what transformers would read beside what it reads first.
_COPIED = (
    "config.json",
    *FILE_NAMES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    *SENTENCE_FILES,
    DATA_CARD,
)
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


def export_huggingface(
    model: ModelDirectory | Path | str, out: Path | str, *, shard_bytes: int | None = None
) -> Path:
    """Copy a model directory to where it will be published, complete, checked, and with a model card.

    A model directory is a Hugging Face directory already; what this adds is the proof that its files
    agree, what one version of transformers wants and another leaves out, and `README.md`.

    Args:
        model: the model directory, or its path.
        out: the new folder. An earlier export there is replaced as a whole.
        shard_bytes: cut the weights into files of at most so many bytes; if not given, they stay
            the files that they are.

    Returns:
        `out`.

    Raises:
        ModelError: files that contradict each other; says which.
        FileError: `out` holds something else, or there is no space.
    """
    model = model if isinstance(model, ModelDirectory) else ModelDirectory.open(model)
    out = Path(out)
    check_target(model.path, out)
    publish(model, out, lineage=model.lineage, shard_bytes=shard_bytes, card=True)
    return out


def publish(
    model: ModelDirectory,
    out: Path,
    *,
    lineage: Mapping[str, Any],
    dtype: str = "",
    shard_bytes: int | None = None,
    card: bool = False,
    changed: Mapping[str, np.ndarray] | None = None,
) -> ModelDirectory:
    """Write a complete copy of a model directory.

    Args:
        lineage: of the copy.
        dtype: "F32", "F16" or "BF16" to convert the weights; "" leaves every byte as it is.
        shard_bytes: as in `export_huggingface`.
        card: write a model card even where the directory has a README.md.
        changed: weights that take the place of the model's; see `ModelDirectory.stored_tensors`.

    Raises:
        ModelError, FileError: as `export_huggingface`.
    """
    settings = _checked_settings(model) if model.has_tokenizer else None
    generation = _checked_generation(model)
    weights = _weight_files(model.path)
    size = sum(path.stat().st_size for path in weights)
    require_space(out.parent, int((2.1 if dtype == "F32" else 1.05) * size), "The exported model")
    with atomic_directory(out) as folder:
        too_large = any(path.stat().st_size > (shard_bytes or path.stat().st_size) for path in weights)
        if dtype or too_large or changed is not None:
            write_shards(folder, model.stored_tensors(dtype, changed), shard_bytes or SHARD_BYTES)
        else:
            for path in weights:
                shutil.copyfile(path, folder / path.name)
        _copy_files(model, folder)
        if dtype:
            _note_dtype(folder / "config.json", dtype)
        if settings is not None:
            write_json(folder / "tokenizer_config.json", settings)
        if generation is not None:
            write_json(folder / "generation_config.json", generation)
        if model.has_tokenizer and model.tokenizer.chat_template:
            with atomic_write(folder / "chat_template.jinja", "w") as file:
                file.write(model.tokenizer.chat_template)
        if lineage or (model.path / LINEAGE_FILE).is_file():
            write_json(folder / LINEAGE_FILE, dict(lineage))
        readme = model.path / "README.md"
        if readme.is_file() and not card:
            shutil.copyfile(readme, folder / "README.md")
        else:
            with atomic_write(folder / "README.md", "w") as file:
                file.write(model_card(model, lineage))
        ModelDirectory.open(folder)  # whole, or it does not get its name
    return ModelDirectory.open(out)


def _copy_files(model: ModelDirectory, folder: Path) -> None:
    """Everything but the weights, and the files by which sentence-transformers runs an encoder."""
    for name in _COPIED:
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, folder / name)
    for pattern in _LICENCES:
        for path in model.path.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    if model.config.shape != "encoder":
        return
    if not (model.path / "modules.json").is_file():
        write_sentence_files(folder, model.config, model.pooling)
        return
    for module in module_folders(model.path):
        (folder / module).mkdir(exist_ok=True)
        if (model.path / module / "config.json").is_file():
            shutil.copyfile(model.path / module / "config.json", folder / module / "config.json")


def _note_dtype(path: Path, dtype: str) -> None:
    name = DTYPE_NAMES[dtype]
    write_json(path, read_json(path, "model configuration") | {"dtype": name, "torch_dtype": name})


def check_target(source: Path, out: Path) -> None:
    """Refuse to replace what is no model, or the source itself.

    Raises:
        FileError: says which.
    """
    if out.exists() and out.resolve() == source.resolve():
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
    config, name = model.config, settings.get("tokenizer_class")
    # the first is a name that transformers 4 refuses; without a name it goes by the model's type, which
    # for decoders may mean a class that does not take tokenizer.json as it is
    unnamed = name is None and config.shape == "decoder" and (model.path / "tokenizer.json").is_file()
    if name == "TokenizersBackend" or unnamed:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # left to itself transformers 4 makes token_type_ids for models that refuse them, and 5 none for BERT
    segments = ["token_type_ids"] if config.segments else []
    settings.setdefault("model_input_names", ["input_ids", *segments, "attention_mask"])
    return settings


def _checked_generation(model: ModelDirectory) -> dict[str, Any] | None:
    """`generation_config.json`, or None for a model that writes nothing."""
    path = model.path / "generation_config.json"
    if model.config.shape == "encoder":
        return None
    if not model.has_tokenizer:
        return read_json(path, "generation setting") if path.is_file() else None
    ids, size = model.tokenizer.ids, model.config.vocab_size
    for name in ("bos", "eos", "pad"):
        token = getattr(ids, name)
        if token is not None and not 0 <= token < size:
            raise ModelError(f"{model.path}: the {name} id {token} is outside the vocabulary of {size:,}.")
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
    if model.config.shape == "encoder_decoder":
        # where there is this file, transformers looks for the start nowhere else
        start = values.setdefault("decoder_start_token_id", model.config.decoder_start)
        if start != model.config.decoder_start:
            raise ModelError(
                f"{path}: 'decoder_start_token_id' is {start}, but in config.json it is {model.config.decoder_start}.",
                "Make the two agree.",
            )
    return values


def _id_list(values: Mapping[str, Any]) -> list[int]:
    listed = values.get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(isinstance(token, int) for token in ids):
        raise ModelError(
            f"'eos_token_id' is {str(listed)[:60]}, which are no ids.", "Set it to a list of ids."
        )
    return ids


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    index = read_json(folder / INDEX_NAME, "weights index")["weight_map"]  # checked when the model was opened
    return [folder / INDEX_NAME, *(folder / name for name in sorted(set(index.values())))]
