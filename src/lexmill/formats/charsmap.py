"""Compiling a table of replacements to the form that SentencePiece, `tokenizers` and llama.cpp normalise text by.

The form: the trie's size in bytes (u32, little-endian), a double-array trie over UTF-8 bytes, and the
replacements, each ended by a NUL. A unit of the trie, 32 bits, is either a node (byte that leads to
it, bit 8: a key ends here, bits 10 and up: offset to its children) or, with bit 31 set, a value
(Yata's darts-clone; `src/normalizer.cc` in google/sentencepiece).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

_LEAF, _VALUE = 1 << 8, 1 << 31
_LARGEST_OFFSET = 1 << 21  # larger ones are written in another way, for tables that we never have


def compile_charsmap(replacements: Mapping[str, str]) -> bytes:
    """The bytes of `Precompiled` normalisation, which replaces the longest key found at each place.

    Args:
        replacements: what to replace, by what. Neither holds a NUL, and no key is empty.
    """
    texts = bytearray()
    places: dict[str, int] = {}
    for text in replacements.values():
        if text not in places:
            places[text] = len(texts)
            texts += text.encode("utf-8") + b"\0"
    keys = {key.encode("utf-8"): places[text] for key, text in replacements.items()}
    assert all(key and b"\0" not in key for key in keys)
    trie = _double_array(keys)
    return struct.pack(f"<I{len(trie)}I", 4 * len(trie), *trie) + bytes(texts)


def _double_array(keys: Mapping[bytes, int]) -> list[int]:
    units: dict[int, int] = {}
    bases: set[int] = set()

    def place(node: int, depth: int, group: list[bytes]) -> None:
        """Find room for the children of `node`, whose keys share their first `depth` bytes."""
        children: dict[int, list[bytes]] = {}
        ends = group[0] if len(group[0]) == depth else None
        for key in group:
            if len(key) > depth:
                children.setdefault(key[depth], []).append(key)
        labels = [*([0] if ends is not None else []), *children]
        # a base of its own for each node: otherwise a byte could lead to another node's child
        base = next(
            base
            for base in range(1, _LARGEST_OFFSET)
            if base not in bases
            and not any(base ^ label in units for label in labels)
            and 0 not in {base ^ label for label in labels}
        )
        bases.add(base)
        assert node ^ base < _LARGEST_OFFSET
        units[node] |= (node ^ base) << 10 | (_LEAF if ends is not None else 0)
        for label in labels:
            units[base ^ label] = label
        if ends is not None:
            units[base] = _VALUE | keys[ends]
        for label, below in children.items():
            place(base ^ label, depth + 1, below)

    units[0] = 0
    if keys:
        place(0, 0, sorted(keys))
    size = (max(units) // 256 + 1) * 256  # readers look up any byte below a node
    return [units.get(number, 0) for number in range(size)]
