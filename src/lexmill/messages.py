"""Conversations as plain data: who may speak, and what a list of messages must look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lexmill.config import suggest
from lexmill.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages: Any, where: str = "messages") -> list[dict[str, Any]]:
    """`messages` as a list of dicts with a known "role" and a string "content"; further keys stay.

    Args:
        messages: what a user, a file or a client gave.
        where: how an error names the place, e.g. "corpus.jsonl, row 3".

    Raises:
        DataError: it is no list, is empty, or a message has no known role or no string as content;
            names the message by its number from 1.
    """
    form = f'"messages" is a list of {{"role", "content"}}; roles are {", ".join(ROLES)}.'
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise DataError(f'{where}: field "messages" is {kind_of(messages)}, not a list.', form)
    if not messages:
        raise DataError(f'{where}: field "messages" is an empty conversation.', form)
    for number, message in enumerate(messages, 1):
        at = f"{where}, message {number:,}"
        if not isinstance(message, Mapping):
            raise DataError(f"{at}: it is {kind_of(message)}, not an object.", form)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            said = "is missing" if role is None else f"{role!r} is unknown"
            hint = suggest(role, ROLES) + " " if isinstance(role, str) else ""
            raise DataError(f"{at}: its role {said}.", hint + form)
        if not isinstance(content, str):
            said = "is missing" if "content" not in message else f"is {kind_of(content)}, not a string"
            raise DataError(f"{at}: its content {said}.", form)
    return [dict(message) for message in messages]


def kind_of(value: Any) -> str:
    """What a JSON value is, as an error says it: "a string", "null" and so on."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, (list, tuple)) else "an object")
