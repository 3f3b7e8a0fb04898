"""What a GGUF file says that a Hugging Face directory has no place for, kept in `lexmill.json` for the way back.

Names of authors, the name of a pre-tokenizer that has several, types of unused tokens, scores: an
import notes each key that an export of its own would leave out or write differently, and an export
writes it again, as long as the tokenizer is the one that was imported and nothing was trained since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lexmill.errors import ModelError
from lexmill.formats.gguf import GGUFFile, Value, string
from lexmill.model.config import ModelConfig
from lexmill.model.gguf_model import ASKED
from lexmill.model.gguf_shapes import shape_metadata
from lexmill.runtimes.gguf_tokenizer import tokenizer_metadata
from lexmill.tokenizer.tokenizer import Tokenizer

_HASH = "tokenizer_sha256"
# An export decides these by what it writes.
_OWN = (
    "general.architecture",
    "general.type",
    "general.name",
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
)


def keep(file: GGUFFile, config: ModelConfig, tokenizer: Tokenizer, pooling: str) -> dict[str, Any]:
    """The keys that an export would not write as they are in the file, as JSON; see `restored`.

    Keys that say how a file was quantised are left out: they would not be true of another.
    """
    try:
        written = tokenizer_metadata(tokenizer, config.vocab_size, str(file.path))
    except ModelError:  # it can be imported, but not be exported to GGUF again
        written = {}
    written |= shape_metadata(config, pooling)
    kept: dict[str, Any] = {}
    for key, value in file.metadata.items():
        if key in (*_OWN, ASKED) or key.startswith("quantize."):
            continue
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        type = file.types[key].removeprefix("array of ")
        mine = written.get(key)
        if mine is not None and mine.type == type and same_value(mine, value):
            continue
        row = {"type": type, "value": plain}
        if mine is not None and isinstance(plain, list) and mine.items and len(mine.value) == len(plain):
            ours = np.asarray(mine.value, np.float32).tolist() if type == "f32" else list(mine.value)
            changes = {
                str(number): theirs for number, (theirs, own) in enumerate(zip(plain, ours)) if theirs != own
            }
            if len(changes) * 4 < len(plain):
                row = {"type": type, "changed": changes}
        kept[key] = row
    return {_HASH: tokenizer.sha256, "keys": kept} if kept else {}


def asked(lineage: Mapping[str, Any]) -> dict[str, Value]:
    """A key of lexmill's own: how the model was asked in training for its tasks, so that it can be asked so again."""
    history = lineage.get("history")
    entries = [
        {"task": entry.get("task"), "asked": entry["asked"]}
        for entry in (history if isinstance(history, list) else [])
        if isinstance(entry, Mapping) and entry.get("asked")
    ]
    return {ASKED: string(json.dumps(entries, ensure_ascii=False))} if entries else {}


def restored(
    lineage: Mapping[str, Any], tokenizer: Tokenizer, written: Mapping[str, Value]
) -> dict[str, Value]:
    """What an export adds to its own keys: those that the import of this model kept.

    Args:
        written: the export's own keys.
    """
    kept = lineage.get("gguf")
    if not isinstance(kept, Mapping) or lineage.get("history") or kept.get(_HASH) != tokenizer.sha256:
        return {}
    found = {}
    rows = kept.get("keys")
    for key, row in rows.items() if isinstance(rows, Mapping) else ():
        if "changed" in row and key in written:
            values = list(written[key].value)
            for number, value in row["changed"].items():
                if number.isdecimal() and int(number) < len(values):
                    values[int(number)] = value
            found[key] = Value(row["type"], values, items=True)
        elif "value" in row:
            found[key] = Value(row["type"], row["value"], items=isinstance(row["value"], list))
    return found


def same_value(mine: Value, found: object) -> bool:
    """Whether a file holds what was meant; reals are compared as float32."""
    if isinstance(found, np.ndarray):
        ours = np.asarray(mine.value)
        return ours.shape == found.shape and bool((ours.astype(found.dtype) == found).all())
    if mine.items:
        return bool(found == list(mine.value))
    return bool(found == (np.float32(mine.value) if mine.type == "f32" else mine.value))
