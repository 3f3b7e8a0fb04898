"""Rows to train, validation and test, by what they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def split_of(group: str, share: float) -> str:
    """The split of a group of rows, the same on every machine: "test" and "validation" get `share` each."""
    number = int.from_bytes(hashlib.sha256(group.encode()).digest()[:6], "big") / 2**48
    return "test" if number < share else "validation" if number < 2 * share else "train"


def write_splits(out: Path, rows: Iterable[tuple[str, Mapping[str, Any]]], share: float = 0.04) -> None:
    """Write each (group, row) to `out/SPLIT.jsonl`, and say how many there are."""
    kept: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for group, row in rows:
        kept[split_of(group, share)].append(json.dumps(row, ensure_ascii=False) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    for split, lines in kept.items():
        (out / f"{split}.jsonl").write_text("".join(lines), "utf-8")
        print(f"{out / split}.jsonl: {len(lines):,} rows")
