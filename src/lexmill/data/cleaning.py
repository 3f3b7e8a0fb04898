"""Cleaning of text: one normal form for all documents, and paragraphs freed from hard-wrapped lines."""

from __future__ import annotations

import re
import unicodedata

WRAPPED_LINE = 50  # characters; prose wrapped at 70 columns has longer lines than this, verse mostly has not

_LINE_ENDS = re.compile("\r\n|[\r\v\f\u0085\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_BLANK_LINES = re.compile("\n{3,}")
_LIST_ITEM = re.compile(r"\s*(?:[-*+•]|\d{1,3}[.)])\s")
_ITALIC = re.compile(r"(?<!\w)_([^_\n]+(?:\n[^_\n]+)*)_(?!\w)")


def normalise(text: str) -> str:
    """Bring a text into the normal form that ids and deduplication rely on.

    All line ends become `\\n`; control characters other than tab and line end, and byte-order marks,
    are dropped; lone surrogates become U+FFFD; the text is in Unicode's normal form C; lines lose
    their trailing spaces, runs of blank lines become one, and the whole loses its outer whitespace.

    Returns:
        A text that encodes to UTF-8, and that `normalise` leaves as it is.
    """
    text = _LINE_ENDS.sub("\n", text)
    text = _CONTROLS.sub("", text)
    text = _SURROGATES.sub("\ufffd", text)
    # After the removals: they may have brought a letter and its accent together.
    text = unicodedata.normalize("NFC", text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip()


def unwrap_paragraphs(text: str) -> str:
    """Join the hard-wrapped lines of prose into one line a paragraph; drop `_` around italic words.

    A paragraph (lines between blank lines) is joined when most of its lines but the last are longer
    than 50 characters and none begins like a list item; so verse, headings, addresses and lists
    keep their lines. A line that ends in `--` is joined without a space, as printers' dashes are set.
    """
    paragraphs = re.split(r"\n[^\S\n]*\n", _ITALIC.sub(r"\1", text))
    return "\n\n".join(_unwrap(paragraph) for paragraph in paragraphs)


def _unwrap(paragraph: str) -> str:
    lines = paragraph.split("\n")
    full = lines[:-1]
    long = sum(len(line.strip()) > WRAPPED_LINE for line in full)
    if not full or long * 2 <= len(full) or any(_LIST_ITEM.match(line) for line in lines):
        return paragraph
    joined = ""
    for line in lines:
        space = "" if not joined or joined.endswith("--") else " "
        joined += space + line.strip()
    return joined
