"""A text's tokens as people see them: which characters each stands for, and which word it belongs to."""

from __future__ import annotations

import bisect
import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lexmill.errors import DataError
from lexmill.tokenizer.tokenizer import Tokenizer

MOST_ADDED = 2  # special tokens that a model may put before or behind what the tokenizer gives
BLANKS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "↵"}
DASHES = "—–…"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What looks, or is looked at: one token, or the tokens of a word together.

    Attributes:
        ids: the token; a word has as many as it has tokens.
        text: how it is shown, without the space before it.
        word: the number of its word in the text, from 0. A special token is a word of its own.
        start, end: its characters in the text; equal for what stands for none, such as [CLS].
        special: it is a special token ([CLS], </s>, <|im_end|>), but not one that marks a gap.
    """

    ids: tuple[int, ...]
    text: str
    word: int
    start: int
    end: int
    special: bool = False


def pieces(tokenizer: Tokenizer, text: str, ids: Sequence[int] | None = None) -> tuple[Piece, ...]:
    """The tokens of a text with the words that they belong to.

    Words are runs without white space, less the punctuation around them; each Han or kana
    character is one, unless a token holds several. White space that is a token of its own is a
    word of its own, but for the single space before a word.

    Args:
        tokenizer: the model's.
        text: any text.
        ids: what the model saw, if that is not exactly `tokenizer.encode(text)`: up to two special
            tokens more at either end (a decoder's start token), or without padding.

    Raises:
        DataError: `ids` are not those of the text.
    """
    encoded, offsets = tokenizer.encode_with_offsets(text)
    ids = [int(token) for token in (encoded if ids is None else ids)]
    places = _places(encoded, offsets, ids)
    trimmed = [_trimmed(text, *place) for place in places]
    spans = _words(text, [place for place in trimmed if place[0] < place[1]])
    firsts = [start for start, _ in spans]
    found: list[Piece] = []
    word, last = -1, (-1, -1)
    gaps = {tokenizer.ids.mask, *tokenizer.ids.sentinels}  # these stand for words, and are looked at as such
    for token, (start, end) in zip(ids, trimmed):
        own = tokenizer.token_text(token)
        named = own in tokenizer.special_texts and text[start:end] == own
        special = start == end or (named and token not in gaps)
        span = (-1, -1) if special else spans[bisect.bisect_right(firsts, start) - 1]
        if special or span != last:
            word += 1
        last = span
        shown = own if special else _visible(text[start:end])
        found.append(Piece(ids=(token,), text=shown, word=word, start=start, end=end, special=special))
    return tuple(found)


def grouped(parts: Sequence[Piece], text: str) -> tuple[tuple[Piece, ...], list[list[int]]]:
    """Words instead of tokens, and for each the indices of its tokens."""
    members: list[list[int]] = []
    for index, piece in enumerate(parts):
        if index and parts[index - 1].word == piece.word:
            members[-1].append(index)
        else:
            members.append([index])
    words = []
    for number, member in enumerate(members):
        first, start = parts[member[0]], min(parts[i].start for i in member)
        end = max(parts[i].end for i in member)
        words.append(
            Piece(
                ids=tuple(token for i in member for token in parts[i].ids),
                text=first.text if first.special else _visible(text[start:end]).strip(),
                word=number,
                start=start,
                end=end,
                special=first.special,
            )
        )
    return tuple(words), members


def labels(parts: Sequence[Piece]) -> list[str]:
    """How the pieces are written in rows and columns: a token that goes on with a word begins with a dot."""
    return [
        f"·{piece.text}" if index and parts[index - 1].word == piece.word else piece.text
        for index, piece in enumerate(parts)
    ]


def find_word(parts: Sequence[Piece], word: str) -> list[list[int]]:
    """Every place where `word` stands: the indices of its tokens or words. Case does not matter.

    A word may span several words of the text, as 银行 spans two characters.
    """
    wanted = _folded(word)
    found = []
    for first in range(len(parts)):
        if first and parts[first].word == parts[first - 1].word:
            continue  # only a whole word is a word
        text = ""
        end = -1
        for index in range(first, len(parts)):
            piece = parts[index]
            if index > first and piece.special:
                break
            if piece.start >= end or piece.special:  # the bytes of one character repeat it
                text += _folded(piece.text.strip("␣"))
                end = piece.end
            whole = index + 1 == len(parts) or parts[index + 1].word != piece.word
            if text == wanted and whole and wanted:
                found.append(list(range(first, index + 1)))
            if not wanted.startswith(text):
                break
    return found


def word_missing(word: str, text: str, parts: Iterable[Piece], where: str = "the text") -> DataError:
    """The error that says which text lacks a word, and which words it has."""
    there = list(dict.fromkeys(piece.text for piece in parts if not piece.special))
    some = ", ".join(there[:12]) + (" …" if len(there) > 12 else "")
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    return DataError(f"The word {word!r} is not in {where}, {shown!r}.", f"Its words are: {some}.")


# ---------------------------------------------------------------- offsets and words


def _places(
    encoded: Sequence[int], offsets: Sequence[tuple[int, int]], ids: Sequence[int]
) -> list[tuple[int, int]]:
    """The characters of each of `ids`, given those of the tokenizer's own encoding."""
    if list(encoded) == list(ids):
        return list(offsets)
    for lead in range(min(MOST_ADDED, len(ids)) + 1):
        same = 0
        while same < min(len(encoded), len(ids) - lead) and encoded[same] == ids[lead + same]:
            same += 1
        left_out = offsets[same:]
        if len(ids) - lead - same <= MOST_ADDED and all(start == end for start, end in left_out):
            return [(0, 0)] * lead + list(offsets[:same]) + [(0, 0)] * (len(ids) - lead - same)
    raise DataError("The token ids are not those of the text.", "Encode the text with the model's tokenizer.")


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The same characters without white space around them, unless there is nothing else."""
    inner = text[start:end]
    if not inner.strip():
        return start, end
    return start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())


def _words(text: str, places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that cover the whole text, each a word or a run of white space; none ends inside a token."""
    cuts = set(_cuts(text))
    for start, end in places:
        cuts -= set(range(start + 1, end))
        if text[start:end] == " " and text[end : end + 1].strip():
            cuts.discard(end)  # the space before a word is part of it, as in most tokens
    edges = sorted(cuts | {0, len(text)})
    return list(itertools.pairwise(edges))


def _cuts(text: str) -> list[int]:
    """Where a word may begin or end."""
    kinds = [_kind(character) for character in text]
    # Punctuation inside a word ("don't", "3.14", "well-known") is part of it.
    for index, kind in enumerate(kinds):
        inside = kinds[index - 1 : index] + kinds[index + 1 : index + 2] == ["letter", "letter"]
        if kind == "mark" and inside and text[index] not in DASHES:
            kinds[index] = "letter"
    return [
        index for index in range(1, len(text)) if kinds[index] != kinds[index - 1] or kinds[index] == "sign"
    ]


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    code = ord(character)
    if 0x3040 <= code <= 0x30FF or 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or code >= 0x20000:
        return "sign" if unicodedata.category(character)[0] == "L" else "letter"
    return "mark" if unicodedata.category(character)[0] in "PS" else "letter"


def _visible(text: str) -> str:
    if text.strip():
        return text
    return "".join(BLANKS.get(character, "␣") for character in text[:4]) + ("…" if len(text) > 4 else "")


def _folded(text: str) -> str:
    return "".join(text.casefold().split())
