"""Ids to text as they come: what can be shown now, and never half a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lexmill.tokenizer.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Decoders whose text for some ids begins with their text for the first few of them.
_GROWING = frozenset({"ByteFallback", "Fuse", "Metaspace", "WordPiece", "BPEDecoder", "Strip"})


class StreamDecoder:
    """Turns ids into text as they come.

    `push` returns what can be shown now: text that ends in half a character waits. The pieces
    and `finish` together are `decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # `_shown` first ids of `_ids` are shown already and stay as context: what a token prints
        # depends on whether another comes before it. Those before the last shown ones are forgotten.
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that this id completes, possibly empty. An embedding row that pads the vocabulary has none."""
        tokenizer = self._tokenizer
        if token >= tokenizer.vocab_size:
            return ""
        if self._skip_special and tokenizer.token_text(token) in tokenizer.special_texts:
            return ""
        piece = tokenizer.token_bytes(token)
        if piece is not None:
            return self._utf8.decode(piece)
        self._ids.append(token)
        # whether a run of byte tokens is a text or not shows only at its end
        if not tokenizer.text_grows or _BYTE_TOKEN.fullmatch(tokenizer.token_text(token)):
            return ""
        text = self._rest()
        if not text or text.endswith("\ufffd"):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text

    def finish(self) -> str:
        """What was held back: U+FFFD for a character whose end never came."""
        return self._rest() if self._ids else self._utf8.decode(b"", final=True)

    def _rest(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._ids[: self._shown], skip_special=self._skip_special)
        return decode(self._ids, skip_special=self._skip_special)[len(before) :]


def text_grows(decoder: Mapping[str, Any] | None) -> bool:
    """Whether another id can only add to the text of those before it, so that the text can be shown at once.

    Args:
        decoder: as in tokenizer.json; None joins the tokens with spaces.
    """
    if decoder is None:
        return True
    steps = decoder.get("decoders") or [] if decoder.get("type") == "Sequence" else [decoder]
    fused = False
    for step in steps:
        kind = step.get("type")
        if kind not in _GROWING and not (kind == "Replace" and not fused):  # in one token, or across them
            return False
        fused = fused or kind == "Fuse"
    return True
