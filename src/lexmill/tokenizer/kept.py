"""A tokenizer that was made of another file's vocabulary, kept beside that file: making it takes far longer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lexmill.errors import FileError, FormatError
from lexmill.files import atomic_write
from lexmill.tokenizer.special import SpecialIds
from lexmill.tokenizer.tokenizer import Tokenizer

_VERSION = 1  # of how tokenizers are made: with another one what was kept is made anew
_MOST_BYTES = 1 << 28


def kept_tokenizer(source: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer of a file: as it was kept, or made, and then kept if the folder can be written to.

    Args:
        source: when it changes, what was kept is old.
    """
    path, status = source.with_name(source.name + ".tokenizer"), source.stat()
    key = [_VERSION, status.st_size, status.st_mtime_ns]
    found = _read(path, key)
    if found is not None:
        return found
    made = make()
    row = {
        "key": key,
        "ids": asdict(made.ids),
        "chat_template": made.chat_template,
        "settings": made.settings,
        "json": made.json,
    }
    with contextlib.suppress(FileError, OSError), atomic_write(path, "w") as file:
        json.dump(row, file, ensure_ascii=False)
    return made


def _read(path: Path, key: list[int]) -> Tokenizer | None:
    """What a file keeps; None if there is none, or an old or a damaged one."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        row = json.loads(path.read_text("utf-8"))
        if row["key"] != key or not all(isinstance(row[name], str) for name in ("json", "chat_template")):
            return None
        found = Tokenizer(row["json"], _ids(row["ids"]), row["chat_template"], settings=dict(row["settings"]))
        size = found.vocab_size
        listed = (found.ids.stop, found.ids.sentinels)
        named = [getattr(found.ids, one.name) for one in fields(SpecialIds)]
        ids = [one for one in named if isinstance(one, int) and not isinstance(one, bool)]
        return found if all(0 <= one < size for one in [*ids, *listed[0], *listed[1]]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, FormatError):
        return None


def _ids(values: dict[str, Any]) -> SpecialIds:
    listed = {name: tuple(map(int, values[name])) for name in ("stop", "sentinels")}
    return SpecialIds(**{**values, **listed})
