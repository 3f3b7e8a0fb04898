"""Token shards that were made before need not be made again: after a resume, or in another process of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lexmill.errors import LexmillError
from lexmill.files import read_json, sha256_file, write_json
from lexmill.tokenizer.tokenizer import Tokenizer

_FILE = "made-from.json"
_VERSION = 1  # goes up when the same documents become other shards


def made_before(
    out: Path, documents: Path, tokenizer: Tokenizer, splits: tuple[str, ...], **how: Any
) -> bool:
    """Whether the shards in `out` come from these very documents and this tokenizer, in this way."""
    try:
        return read_json(out / _FILE) == _facts(documents, tokenizer, splits, how)
    except LexmillError:
        return False


def remember_made(
    out: Path, documents: Path, tokenizer: Tokenizer, splits: tuple[str, ...], **how: Any
) -> None:
    """Write down what the shards in `out` come from, once they stand."""
    write_json(out / _FILE, _facts(documents, tokenizer, splits, how))


def _facts(
    documents: Path, tokenizer: Tokenizer, splits: tuple[str, ...], how: dict[str, Any]
) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "documents_sha256": {split: sha256_file(documents / f"{split}.parquet") for split in splits},
        "tokenizer_sha256": tokenizer.sha256,
        **how,
    }
