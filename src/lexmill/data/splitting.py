"""Two kinds of splitting: a long text into documents, and documents into training and validation."""

from __future__ import annotations

import hashlib
import re

from lexmill.errors import ConfigError

SHORT_OPENING = 200  # characters; a title page, not a document


def compile_rule(rule: str) -> re.Pattern[str] | None:
    """The regular expression of a split rule; None for the rules with a name.

    Raises:
        ConfigError: it is neither a known name nor a regular expression.
    """
    if rule in ("file", "blank-lines"):
        return None
    try:
        return re.compile(rule)
    except re.error as error:
        raise ConfigError(
            f"split = {rule!r} is not a regular expression: {error}.",
            'Use "file", "blank-lines", or an expression that matches the first line of each document.',
        ) from error


def split_documents(text: str, rule: str) -> list[str]:
    """Split one text into documents.

    Args:
        text: normalised text.
        rule: "file" keeps it whole; "blank-lines" makes each paragraph a document; anything else is
            a regular expression that is searched in each line and matches the first line of a document.

    Returns:
        The documents, none empty. What stands before the first match is a document of its own when it
        has at least 200 characters; a shorter opening, or a heading with nothing under it ("VOLUME I"
        above "CHAPTER I"), begins the document that follows.

    Raises:
        ConfigError: the rule is no regular expression.
    """
    pattern = compile_rule(rule)
    if pattern is None:
        pieces = [text] if rule == "file" else text.split("\n\n")
        return [piece.strip() for piece in pieces if piece.strip()]
    documents: list[str] = []
    carried: list[str] = []  # lines of an opening or heading that belongs to the next document
    current: list[str] = []
    in_opening = True
    for line in text.split("\n"):
        if pattern.search(line):
            body = "\n".join(current if in_opening else current[1:]).strip()
            if len(body) < (SHORT_OPENING if in_opening else 1):
                carried += current
            else:
                documents.append("\n".join(carried + current).strip())
                carried = []
            current, in_opening = [], False
        current.append(line)
    documents.append("\n".join(carried + current).strip())
    return [document for document in documents if document]


def words_of(text: str) -> str:
    """The words of a text in lower case, without punctuation: what texts that must not be parted have in common."""
    return " ".join(re.findall(r"\w+", text.lower())) or text


def split_position(key: str, seed: int) -> float:
    """Where a key falls in [0, 1): by its hash alone, so independent of order and of other keys."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)  # 53 bits: exact as a float, never 1.0


def assign_split(document_id: str, seed: int, validation_fraction: float) -> str:
    """ "train" or "validation" for one document.

    Args:
        document_id: its id, or the key of a group that must stay together.
        seed: another seed gives another split.
        validation_fraction: the expected share of validation, in [0, 1).
    """
    return "validation" if split_position(document_id, seed) < validation_fraction else "train"
