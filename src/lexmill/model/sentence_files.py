"""The files by which sentence-transformers, and llama.cpp's converter, know how an encoder's tokens become one vector."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexmill.errors import ModelError
from lexmill.files import read_json, write_json
from lexmill.model.config import ModelConfig

POOLING_FOLDER = "1_Pooling"
SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
# lexmill's names, and the flags of 1_Pooling/config.json
_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "last": "pooling_mode_lasttoken",
}
_OTHER_FLAGS = ("pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")


def write_sentence_files(folder: Path, config: ModelConfig, pooling: str = "mean") -> None:
    """Write them beside an encoder's other files.

    Args:
        pooling: "mean", "cls", "max" or "last".
    """
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": POOLING_FOLDER, "type": "sentence_transformers.models.Pooling"},
    ]
    flags = {flag: name == pooling for name, flag in _FLAGS.items()} | dict.fromkeys(_OTHER_FLAGS, False)
    (folder / POOLING_FOLDER).mkdir(exist_ok=True)
    write_json(
        folder / POOLING_FOLDER / "config.json",
        {"word_embedding_dimension": config.width, **flags, "include_prompt": True},
    )
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": config.context, "do_lower_case": False}
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def read_pooling(folder: Path) -> str | None:
    """What a directory says of its pooling; None where it says nothing.

    Raises:
        ModelError: a kind that lexmill does not have, or a folder that leads out of the directory.
        FormatError: a file that is damaged.
    """
    if not (folder / "modules.json").is_file():
        return None
    for type, path in _modules(folder):
        if type.endswith(".Pooling"):
            if not (folder / path / "config.json").is_file():
                return None
            return _pooling(read_json(folder / path / "config.json", "pooling settings"), folder / path)
    return None


def module_folders(folder: Path) -> list[str]:
    """The folders beside the model's files that `modules.json` names.

    Raises:
        ModelError: one leads out of the directory.
        FormatError: the file is damaged.
    """
    return [path for _, path in _modules(folder) if path]


def _modules(folder: Path) -> list[tuple[str, str]]:
    modules = read_json(folder / "modules.json", "list of modules")
    found = []
    for module in modules if isinstance(modules, list) else []:
        type, path = (
            (str(module.get(key, "")) for key in ("type", "path"))
            if isinstance(module, Mapping)
            else ("", "")
        )
        if path and not _FOLDER.fullmatch(path):
            raise ModelError(f"{folder / 'modules.json'}: {path[:60]!r} is not a folder beside it.")
        found.append((type, path))
    return found


def _pooling(values: Any, where: Path) -> str:
    values = values if isinstance(values, Mapping) else {}
    named = values.get("pooling_mode")
    if isinstance(named, str):
        on = [named]
    else:
        flags = {flag: name for name, flag in _FLAGS.items()}
        on = [
            flags.get(key, key) for key, value in values.items() if key.startswith("pooling_mode") and value
        ]
    if len(on) != 1 or on[0] not in _FLAGS:
        raise ModelError(
            f"{where / 'config.json'}: pooling of the kind {', '.join(map(str, on)) or 'none'} is not supported.",
            f"Kinds are {', '.join(_FLAGS)}, one at a time.",
        )
    return on[0]
