"""Conversations to prompt text, by a Jinja chat template rendered the way transformers renders it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from lexmill.errors import DataError, FormatError
from lexmill.messages import check_messages

MAX_TEMPLATE_CHARACTERS = 1 << 20


def render_chat(
    template: str,
    messages: Any,
    *,
    add_generation_prompt: bool = True,
    special_texts: Mapping[str, str] | None = None,
) -> str:
    """Render a conversation to the text that the model sees.

    Args:
        template: Jinja source, as in `chat_template.jinja`.
        messages: dicts with "role" and "content".
        add_generation_prompt: end with the opening of the assistant's next turn.
        special_texts: what the template may call `bos_token`, `eos_token` and so on.

    Raises:
        DataError: malformed messages, or the template itself refuses the conversation.
        FormatError: the template is no valid Jinja, tries to leave its sandbox, or works without end.
    """
    import jinja2

    from lexmill.tokenizer.sandbox import rendering

    messages = check_messages(messages)
    compiled = _compile(template)
    try:
        with rendering():
            return compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **(special_texts or {})
            )
    except _TemplateRefusal as error:
        raise DataError(f"The chat template refuses this conversation: {error}.") from error
    except jinja2.exceptions.SecurityError as error:
        raise FormatError(
            f"The chat template does what is not allowed: {error}.",
            "Use another template, or a model from another source.",
        ) from error
    except RecursionError as error:
        raise FormatError("The chat template calls itself without end.") from error
    except (
        jinja2.exceptions.TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        MemoryError,
    ) as error:
        raise FormatError(f"The chat template cannot be rendered: {error}.") from error


class _TemplateRefusal(Exception):
    pass


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    import jinja2

    from lexmill.tokenizer.sandbox import Sandbox

    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise FormatError(
            f"The chat template has {len(template):,} characters; more than 2^20 is not plausible."
        )

    def raise_exception(message: str) -> None:
        raise _TemplateRefusal(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent
        )  # not HTML-escaped, as in transformers

    environment = Sandbox(
        {"tojson": tojson}, trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except (jinja2.exceptions.TemplateError, RecursionError, SyntaxError) as error:
        raise FormatError(f"The chat template is not valid Jinja: {error}.") from error
