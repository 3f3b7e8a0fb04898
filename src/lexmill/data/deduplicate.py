"""Exact deduplication: of documents with the same content the first one stays."""

from __future__ import annotations

from dataclasses import dataclass

from lexmill.data.documents import Document, content_hash


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """A document that was dropped: `source` has the content of `same_as`; both have the id `id`."""

    id: str
    source: str
    same_as: str


class ExactDuplicates:
    """Remembers the content of all documents seen, as hashes, and which repeated which.

    Chats are compared by their messages, texts by their text; sources and licences do not count.
    """

    def __init__(self) -> None:
        self.found: list[Duplicate] = []
        self._first: dict[str, str] = {}

    def is_new(self, document: Document) -> bool:
        """True for the first document with this content; a later one is noted in `found`."""
        content = content_hash(document.text, document.messages)
        first = self._first.get(content)
        if first is None:
            self._first[content] = document.source
            return True
        self.found.append(Duplicate(id=document.id, source=document.source, same_as=first))
        return False
