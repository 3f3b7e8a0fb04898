"""The one place where the `tokenizers` library is met: its untyped exceptions and panics become ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from lexmill.errors import DataError, FormatError

_HINT = "It may be cut off; copy it again."


def parse(json: str, where: str = "tokenizer.json") -> Any:
    """A `tokenizers.Tokenizer` of the text of tokenizer.json, which neither cuts nor pads.

    Raises:
        FormatError: the text is no tokenizer.
    """
    import tokenizers

    with panics_as_errors(f"{where} is not a tokenizer file"):
        try:
            fast = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the library raises bare Exceptions
            raise FormatError(f"{where} is not a tokenizer file: {str(error)[:200]}.", _HINT) from error
    fast.no_truncation()  # transformers too heeds these only when asked to
    fast.no_padding()
    return fast


@contextlib.contextmanager
def panics_as_errors(what: str) -> Iterator[None]:
    """Turn a panic of the library, which is no `Exception`, into a `FormatError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{what}: {str(error)[:200]}.", _HINT) from error


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Check that UTF-8 can express the texts.

    Raises:
        DataError: one holds a lone surrogate.
    """
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"The text holds a lone surrogate at character {error.start}, which UTF-8 cannot express.",
                "It comes from a wrong decoding; decode the source again, or normalise it.",
            ) from error
