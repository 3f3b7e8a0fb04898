"""Token shards that were made before need not be made again: after a resume, or in another process of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lexmill.errors import LexmillError
from lexmill.files import read_json, sha256_file, write_json
from lexmill.tokenizer.tokenizer import Tokenizer

_FILE = "made-from.json"
_VERSION = 1  # goes up when the same documents become other shards


class Origin:
    """What the token shards in a folder come from, as far as it decides their bytes.

    Args:
        how: settings beside documents and tokenizer.
    """

    def __init__(
        self, folder: Path, documents: Path, tokenizer: Tokenizer, splits: tuple[str, ...], **how: Any
    ) -> None:
        self._note = folder / _FILE
        self._facts = {
            "version": _VERSION,
            "documents_sha256": {split: sha256_file(documents / f"{split}.parquet") for split in splits},
            "tokenizer_sha256": tokenizer.sha256,
            **how,
        }

    def is_of_shards(self) -> bool:
        """Whether finished shards lie there that come from just this."""
        try:
            return read_json(self._note) == self._facts
        except LexmillError:
            return False

    def forget(self) -> None:
        """Shards are about to be replaced: until all stand, nothing is said of them."""
        self._note.unlink(missing_ok=True)

    def remember(self) -> None:
        """Write it down: the shards stand."""
        write_json(self._note, self._facts)
