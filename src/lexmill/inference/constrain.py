"""Texts that must have a form: a JSON schema, a regular expression, or a grammar, through the package llguidance.

It fails closed: what cannot be understood in full is refused before anything is written, and a token that the form
does not allow is never taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lexmill.errors import ConfigError, MissingPackageError, ModelError
from lexmill.tokenizer.tokenizer import Tokenizer

FormKind = Literal["json_schema", "regex", "grammar"]

_NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}
# Between the parts of JSON; without an end to it a small model may write nothing but blanks.
_WHITESPACE = r"[\x20\x0A\x09]{0,20}"
_MOST_LETTERS = 1 << 20  # of a form


@dataclass(frozen=True)
class Form:
    """What a text has to look like, all of it.

    Attributes:
        kind: a JSON schema, a regular expression (Rust's syntax), or a grammar (Lark's or llama.cpp's GBNF).
        text: the schema, the expression or the grammar itself.
    """

    kind: FormKind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in _NAMES:
            raise ConfigError(f"There is no form '{self.kind}'.", f"Take one of {', '.join(_NAMES)}.")
        if not self.text.strip():
            raise ConfigError(f"The {_NAMES[self.kind]} is empty.")
        if len(self.text) > _MOST_LETTERS:
            raise ConfigError(f"The {_NAMES[self.kind]} is longer than {_MOST_LETTERS:,} letters.")


class Constraint:
    """Which tokens may come next in a text of a form."""

    def __init__(self, matcher: Any, form: Form) -> None:
        self._matcher, self._form = matcher, form

    def allowed(self, size: int) -> np.ndarray:
        """A bit a token, uint32 words for `size` tokens; those that end the text where it may end.

        Raises:
            ModelError: the form can be neither continued nor ended, or is too hard to follow.
        """
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        words = np.zeros(-(-size // 32), np.uint32)
        common = min(len(words), len(found))
        words[:common] = found[:common]
        if size % 32:
            words[-1] &= np.uint32((1 << size % 32) - 1)
        if not words.any():
            raise self._broken("no token of the model can follow")
        return words

    def advance(self, token: int) -> None:
        """A token was taken.

        Raises:
            ModelError: it was not allowed.
        """
        if not self._matcher.consume_token(token):
            raise self._broken(self._matcher.get_error() or f"token {token} is not allowed")

    def forced(self) -> list[int]:
        """Ids that are likely to come next, because the text that follows is settled; none of them is sure."""
        found = self._matcher.compute_ff_tokens()
        self._check()
        return [int(token) for token in found]

    def fitting(self, ids: Sequence[int]) -> int:
        """How many of these may follow one after the other."""
        count = int(self._matcher.validate_tokens(list(ids)))
        self._check()
        return count

    def _check(self) -> None:
        if self._matcher.is_error():
            raise self._broken(self._matcher.get_error())

    def _broken(self, why: str) -> ModelError:
        return ModelError(
            f"The text cannot go on in the form of its {_NAMES[self._form.kind]}: {_first_line(why)}.",
            "Nothing was written that does not fit. Make the form simpler.",
        )


def constrain(form: Form, tokenizer: Tokenizer) -> Constraint:
    """A form as the tokens of a model, at the beginning of a text.

    Raises:
        ConfigError: a form that cannot be understood, or has parts that would be passed over.
        MissingPackageError: llguidance is not installed.
        ModelError: the tokenizer cannot be constrained.
    """
    try:
        import llguidance
    except ImportError:
        raise MissingPackageError("llguidance", "to hold a text to a form", "constrain") from None
    known = _vocabulary(tokenizer)
    make: dict[str, Callable[[str], str]] = {
        "json_schema": _json_schema,
        "regex": llguidance.LLMatcher.grammar_from_regex,
        "grammar": _grammar,
    }
    matcher = llguidance.LLMatcher(known, make[form.kind](form.text), log_level=0)
    if matcher.is_error():
        raise ConfigError(
            f"This {_NAMES[form.kind]} cannot be used: {_first_line(matcher.get_error())}.",
            "What is not understood is refused, not passed over.",
        )
    return Constraint(matcher, form)


def _json_schema(text: str) -> str:
    import json

    import llguidance

    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The JSON schema is no JSON: {error}.") from None
    if not isinstance(schema, (dict, bool)):
        raise ConfigError("A JSON schema is an object, or true or false.")
    options: Any = {"whitespace_pattern": _WHITESPACE, "lenient": False}
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options)


def _grammar(text: str) -> str:
    import llguidance
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return llguidance.LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # the translator of GBNF has no kind of its own
        raise ConfigError(f"This grammar cannot be used: {_first_line(str(error))}.") from None


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    """The tokenizer as llguidance knows it; making it takes a third of a second."""
    import llguidance

    if not tokenizer.ids.stop:
        raise ModelError(
            "This tokenizer has no token that ends a text, so that no form could ever be complete."
        )
    try:
        return llguidance.LLTokenizer(
            tokenizer.json, n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.ids.stop)
        )
    except Exception as error:  # it tells of what it does not know as ValueError and as panic alike
        raise ModelError(
            f"llguidance does not know this kind of tokenizer: {_first_line(str(error))}."
        ) from None


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip(".")[:300]
