"""Text out of HTML and Markdown: what a reader of the page reads, without its navigation and its marks."""

from __future__ import annotations

import codecs
import re
from typing import Any

_META_CHARSET = re.compile(rb"<meta[^>]+charset", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A(---|\+\+\+)[^\S\n]*\n.*?\n\1[^\S\n]*(?:\n|\Z)", re.DOTALL)


def html_to_text(raw: bytes) -> tuple[str, str]:
    """The main content of an HTML page (resiliparse), or all its text when no part stands out.

    The encoding is that of a byte-order mark, else of the page's `meta`, else UTF-8 when it fits, else a guess.

    Returns:
        The text, empty when the page shows none; and the page's title.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse_from_bytes(raw, _html_encoding(raw), errors="replace")
    text = extract_plain_text(tree, preserve_formatting=True, main_content=True)
    if not text.strip():
        text = extract_plain_text(tree, preserve_formatting=True, main_content=False)
    return text, " ".join((tree.title or "").split())


def _html_encoding(raw: bytes) -> str:
    from resiliparse.parse.encoding import detect_encoding

    if raw.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if not _META_CHARSET.search(raw[:1024]):
        try:
            raw.decode("utf-8")
            return "utf-8"
        except UnicodeDecodeError:
            pass
    return detect_encoding(raw, from_html_meta=True) or "utf-8"


def markdown_to_text(text: str) -> str:
    """Plain text of a Markdown page: headings, paragraphs, lists, quotations, tables and code, without marks.

    Front matter, raw HTML and link targets are dropped; an image leaves its alternative text.
    """
    from markdown_it import MarkdownIt

    text = _FRONT_MATTER.sub("", text.replace("\r\n", "\n").lstrip("\ufeff"))
    return _Lines().render(MarkdownIt("commonmark").enable("table").parse(text))


class _Lines:
    """Collects blocks: a blank line between blocks, none between the items of a list or the rows of a table."""

    def __init__(self) -> None:
        self.text = ""
        self.lists: list[int | None] = []  # the next number of each open list; None for bullets
        self.marker = ""
        self.cells: list[str] | None = None
        self.follows_tight = False

    def render(self, tokens: list[Any]) -> str:
        for token in tokens:
            self._token(token)
        return self.text

    def _token(self, token: Any) -> None:
        kind = token.type
        if kind == "bullet_list_open":
            self.lists.append(None)
        elif kind == "ordered_list_open":
            self.lists.append(int(token.attrGet("start") or 1))
        elif kind in ("bullet_list_close", "ordered_list_close"):
            self.lists.pop()
        elif kind == "list_item_open":
            number = self.lists[-1]
            self.marker = "- " if number is None else f"{number}. "
            if number is not None:
                self.lists[-1] = number + 1
        elif kind == "tr_open":
            self.cells = []
        elif kind == "tr_close":
            self._block("\t".join(self.cells or []), tight=True)
            self.cells = None
        elif kind == "inline":
            content = _inline_text(token.children or [])
            if self.cells is not None:
                self.cells.append(content)
            else:
                self._block(content, tight=bool(self.lists))
        elif kind in ("fence", "code_block"):
            self._block(token.content.rstrip("\n"), tight=False)
        elif kind == "table_close":
            self.follows_tight = False

    def _block(self, content: str, tight: bool) -> None:
        if not content.strip() and not self.marker:
            return
        indent = "  " * max(len(self.lists) - 1, 0)
        rest = indent + " " * len(self.marker) if self.marker else indent + ("  " if self.lists else "")
        first = indent + self.marker if self.marker else rest
        lines = content.split("\n")
        body = "\n".join([first + lines[0], *(rest + line for line in lines[1:])])
        gap = "" if not self.text else "\n" if tight and self.follows_tight else "\n\n"
        self.text += gap + body
        self.marker = ""
        self.follows_tight = tight


def _inline_text(children: list[Any]) -> str:
    parts = []
    for child in children:
        if child.type == "softbreak":
            parts.append(" ")
        elif child.type == "hardbreak":
            parts.append("\n")
        elif child.type == "image":
            parts.append(_inline_text(child.children or []))
        elif child.type in ("text", "code_inline"):
            parts.append(child.content)
    return "".join(parts).strip()
