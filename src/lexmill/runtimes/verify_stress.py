"""Thousands of generated texts on which tokenizers are compared: many scripts, and the borders between them.

The same each time. Only characters that every version of Unicode since 8 has, in letters' own categories,
and texts in composed form (NFC): what differs is a tokenizer, not a table's age.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lexmill.runtimes.verify_report import Check, difference, short
from lexmill.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lexmill.runtimes.verify_checks import Limit

COUNT, _BATCH = 4000, 50

_LETTERS = (
    "AZ az ÀÖ Øö Āſ ΑΡ αω Ая Ѐџ ԱՖ աֆ את ءغ في अह कह ਕਨ કન மஹ కన ಕನ കന කන กะ เๆ ດທ ཀཇ აჰ ကအ ሀቆ ᎠᏴ កឳ ᠠᡂ "
    "ぁゔ ァヺ ㄅㄬ 一龥 一龥 가힣 ꀀꒌ 𐌰𐍊 𐐀𐑏 𒀀𒍮 𠀀𪛖 𝐀𝑔 ＡＺ"
)
_SIGNS = "ाौ ាៅ ิฺ ̀̏ ְֹ ًْ"  # that stand above and below letters
_DIGITS = "09 09 09 ٠٩ ०९ ๐๙ ０９ ²³ ¼¾ Ⅰↈ"
_SYMBOLS = "!/ :@ [` {~ ¡§ –„ ←↓ ∀√ ─╿ ☀☃ 、。 「』 ﹏﹒ €€ 😀🙏 🚀🛅 🏻🏿 🇦🇿"
_SPACES = (" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u2003", "\u3000")
_JOINERS = ("\u200d", "\ufe0f", "\u200b", "_", "-", "'", "’", ".", ",", "/", "@")
_ENDINGS = ("'s", "'T", "'re", "'VE", "'m", "'ll", "'D", "n't", "'", "’s")
_CODE = ("==", "!=", "->", "();", "{\n\t", "}\n", "//", "/*", "#", "0x", "</", "/>", "&&", "\\n", "::", '"""')
_SHAPES = (
    0.34,
    0.12,
    0.12,
    0.14,
    0.08,
    0.06,
    0.08,
    0.06,
)  # how often each kind of piece comes, in the order of `piece`


@functools.cache
def stress_texts(count: int = COUNT) -> tuple[str, ...]:
    """`count` texts of one to nine pieces."""
    rng = np.random.default_rng(20)
    letters, signs, digits, symbols = (_ranges(text) for text in (_LETTERS, _SIGNS, _DIGITS, _SYMBOLS))

    def some(low: int, high: int, source: Sequence[str]) -> str:
        return "".join(source[at] for at in rng.integers(0, len(source), rng.integers(low, high + 1)))

    def piece(script: Sequence[str]) -> str:
        kind = int(rng.choice(len(_SHAPES), p=_SHAPES))
        if kind == 0:
            return some(1, 8, script)
        if kind == 1:
            return some(1, 5, digits[rng.integers(len(digits))])
        if kind == 2:
            return some(1, 3, symbols[rng.integers(len(symbols))])
        if kind == 3:
            return some(1, 2, _SPACES)
        if kind == 4:
            return some(1, 1, script) + some(1, 2, signs[rng.integers(len(signs))])
        return some(1, 1, (_JOINERS, _ENDINGS, _CODE)[kind - 5])

    texts = []
    for _ in range(count):
        scripts = [letters[at] for at in rng.integers(0, len(letters), 2)]
        pieces = [piece(scripts[int(rng.random() < 0.2)]) for _ in range(rng.integers(1, 10))]
        texts.append(unicodedata.normalize("NFC", "".join(pieces)))
    return tuple(texts)


def _ranges(written: str) -> list[str]:
    """Rows of characters from their firsts and lasts, written together."""
    ends = written.replace(" ", "")
    return [
        "".join(map(chr, range(ord(first), ord(last) + 1)))
        for first, last in zip(ends[::2], ends[1::2], strict=True)
    ]


class Stress:
    """The generated texts with lexmill's ids for them, asked in batches: one text of fifty, a line each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = stress_texts()
        self._tokenizer = tokenizer
        self._groups = [texts[begin : begin + _BATCH] for begin in range(0, len(texts), _BATCH)]
        self._ids = tokenizer.encode_batch(["\n".join(group) for group in self._groups])

    def added_to(
        self, check: Check, tokenize: Callable[[str], list[int]], limit: Limit | None = None
    ) -> Check:
        """A check of token ids, with what these texts add to it: each batch that differs counts once.

        A batch whose ids `limit` foretells is no difference, but is told.
        """
        wrong, first, limited = 0, "", 0
        for group, ids in zip(self._groups, self._ids, strict=True):
            answer = tokenize("\n".join(group))
            if answer == ids:
                continue
            if limit is not None and answer == limit.encode("\n".join(group)):
                limited += 1
                continue
            wrong += 1
            first = first or f"; of these {self._first(group, tokenize) or difference(ids, answer)}"
        total = len(self._groups) * _BATCH
        detail = (
            f"{check.detail}; {total:,} generated texts in {len(self._groups)} batches, {wrong} differ{first}"
        )
        if limit is not None and limited:
            texts = [text for group in self._groups for text in group]
            owns = self._tokenizer.encode_batch(texts)
            other = [text for text, own in zip(texts, owns, strict=True) if limit.encode(text) != own]
            detail += f", {limited} ({len(other)} of the texts) are other by the runtime's own rules only"
            check = replace(
                check,
                limits=tuple(
                    dict.fromkeys([*check.limits, *limit.reasons(other, f"{total:,} generated texts")])
                ),
            )
        figure = (check.figure or 0) + wrong
        return replace(check, passed=check.passed is not False and not wrong, figure=figure, detail=detail)

    def _first(self, group: Sequence[str], tokenize: Callable[[str], list[int]]) -> str:
        """The first text of a batch that differs by itself; "" where only their joint does."""
        for text, ids in zip(group, self._tokenizer.encode_batch(list(group)), strict=True):
            answer = tokenize(text)
            if answer != ids:
                return f"{short(text)}: {difference(ids, answer)}"
        return ""
