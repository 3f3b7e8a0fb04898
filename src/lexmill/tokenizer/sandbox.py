"""A Jinja environment for templates that came with a model: what they reach, and how long they work, is bounded.

Jinja's own sandbox keeps a template from Python's insides, but lets it loop, multiply and pad as it
likes. Here every item of a loop, every call, operator and filter is counted, and what would be a very
long text is refused before it is made. It is not a guard against everything: one operation of Python
on nested lists that a template built (a comparison, say) is not interrupted.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import GeneratorType
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
from jinja2.exceptions import SecurityError

MAX_STEPS = 500_000  # loop items, calls, operators and filters in one rendering
MAX_CHARACTERS = 64 << 20  # made by operators, filters and methods, in one rendering
MAX_NUMBER = 1 << 20  # of an argument that could be a width or a count
MAX_SECONDS = 5.0

_METHODS = frozenset(  # of texts; what pads or formats is not among them
    [
        "strip",
        "lstrip",
        "rstrip",
        "split",
        "rsplit",
        "splitlines",
        "partition",
        "rpartition",
        "startswith",
        "endswith",
        "removeprefix",
        "removesuffix",
        "replace",
        "upper",
        "lower",
        "title",
        "capitalize",
        "casefold",
        "swapcase",
        "join",
        "find",
        "rfind",
        "index",
        "rindex",
        "count",
        "isdigit",
        "isalpha",
        "isalnum",
        "isspace",
        "isupper",
        "islower",
        "isnumeric",
        "isdecimal",
        "istitle",
    ]
)
_WIDTH = re.compile(r"[0-9]{5,}|\*")


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.steps, self.characters, self.end = MAX_STEPS, MAX_CHARACTERS, time.monotonic() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        """Count work of about one bytecode loop each."""
        self.steps -= count
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > self.end:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")

    def make(self, characters: int) -> None:
        """Count characters or items that are about to exist."""
        self.characters -= characters
        if self.characters < 0:
            raise SecurityError(f"it makes more than {MAX_CHARACTERS:,} characters")


_budget: contextvars.ContextVar[Budget] = contextvars.ContextVar("template_budget")


@contextlib.contextmanager
def rendering() -> Iterator[None]:
    """One rendering: whatever runs in this block shares one budget."""
    token = _budget.set(Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment. Render only within `rendering()`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(finalize=_finalize, **options)
        self.filters.update(filters)
        del self.globals["lipsum"]  # makes text without end
        self.filters.update({name: _guarded_filter(name, made) for name, made in self.filters.items()})
        self.filters["counted items"] = _Counted  # names that no template can write
        self.filters["joined parts"] = _concatenate

    def _parse(self, source: str, name: Any, filename: Any) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            loop.iter = _filtered(loop.iter, "counted items")
        for parent in list(tree.find_all(jinja2.nodes.Node)):
            for field, value in parent.iter_fields():
                if isinstance(value, jinja2.nodes.Concat):
                    setattr(parent, field, _joined(value))
                elif isinstance(value, list):
                    value[:] = [_joined(v) if isinstance(v, jinja2.nodes.Concat) else v for v in value]
        return tree

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Every call in a template comes through here."""
        _check_arguments((*args, *kwargs.values()))
        if isinstance(obj, jinja2.runtime.LoopContext) and args:  # a recursive loop
            args = (_Counted(args[0]), *args[1:])
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            _check_method(owner, name, args)
        return _check_result(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        """Jinja's way to `str.format`, which could pad without end."""
        if super().wrap_str_format(value) is not None:
            raise SecurityError("texts have no method 'format' here")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse results that would be very large before they are made."""
        budget = _budget.get()
        budget.step()
        sizes = [_length(side) for side in (left, right)]
        if operator == "*" and any(sizes):
            number = right if sizes[0] else left
            budget.make(sizes[0] + sizes[1] if not isinstance(number, int) else max(sizes) * max(0, number))
        elif operator == "+" and any(sizes):
            budget.make(sum(sizes))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (max(0, right) if operator == "**" else 1) + right.bit_length()
            if bits > 4096:
                raise SecurityError("it makes a number of more than 4,096 bits")
        return super().call_binop(context, operator, left, right)


def _filtered(node: Any, name: str) -> Any:
    return jinja2.nodes.Filter(
        node, name, [], [], None, None, lineno=node.lineno, environment=node.environment
    )


def _joined(node: Any) -> Any:
    parts = jinja2.nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)
    return _filtered(parts, "joined parts")


def _concatenate(parts: list[Any]) -> str:
    _budget.get().step()
    texts = [part if isinstance(part, str) else str(_measured(part)) for part in parts]
    _budget.get().make(sum(map(len, texts)))
    return "".join(texts)


class _Counted:
    """An iterable whose items are counted as they are taken."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        step = _budget.get().step
        for item in self._items:
            step()
            yield item

    def __len__(self) -> int:
        return len(self._items)  # a TypeError, where the items have no length, is what Jinja expects


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0


def _measured(value: Any) -> Any:
    """`value`, once it is known that printing it is not endless: lists may hold one list many times."""
    budget = _budget.get()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        budget.step()
        if isinstance(item, str):
            budget.make(len(item))
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += item
    return value


def _finalize(value: Any) -> Any:
    return _measured(value) if isinstance(value, (list, tuple, set, frozenset, Mapping)) else value


def _check_arguments(values: Iterable[Any]) -> None:
    _budget.get().step()
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise SecurityError(f"the number {str(value)[:20]} is too large for an argument")


def _check_format(form: str, values: Any) -> None:
    if _WIDTH.search(form):
        raise SecurityError("a format asks for a width of five digits or more")
    _measured(values)


def _check_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    budget = _budget.get()
    if name not in _METHODS:
        raise SecurityError(f"texts have no method '{name[:40]}' here")
    budget.make(len(text))
    if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        budget.make(text.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        items = args[0] if isinstance(args[0], (list, tuple, str)) else ()
        budget.make(len(text) * len(items) + sum(len(item) for item in items if isinstance(item, str)))


def _check_result(value: Any) -> Any:
    _budget.get().make(_length(value))
    return value


def _guarded_filter(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts what it does; one that takes the context or environment goes on taking it."""
    special = hasattr(original, "jinja_pass_arg")

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        own = args[1:] if special else args
        _check_arguments((*own, *kwargs.values()))
        if own and name in _PRINTING:
            _measured(own[0])
        if own and name == "replace" and isinstance(own[0], str) and len(own) >= 3:
            _budget.get().make(own[0].count(str(own[1])) * len(str(own[2])))
        elif own and name == "format":
            _check_format(str(own[0]), [*own[1:], *kwargs.values()])
        elif name == "sum" and not isinstance(kwargs.get("start", 0), (int, float)):
            raise SecurityError("the filter 'sum' adds only numbers here")
        elif own and name == "join":
            args = _join_arguments(args, special)
        result = original(*args, **kwargs)
        return _Stream(_Counted(result)) if isinstance(result, GeneratorType) else _check_result(result)

    return guarded


# Filters that write out a whole value, lists in lists included.
_PRINTING = frozenset(
    [
        "string",
        "tojson",
        "pprint",
        "escape",
        "e",
        "forceescape",
        "urlencode",
        "xmlattr",
        "upper",
        "lower",
        "title",
    ]
)


def _join_arguments(args: tuple[Any, ...], special: bool) -> tuple[Any, ...]:
    at = int(special)
    items = list(args[at]) if not isinstance(args[at], jinja2.Undefined) else []
    separator = str(args[at + 1]) if len(args) > at + 1 else ""
    _measured(items)
    _budget.get().make(len(separator) * len(items))
    return (*args[:at], items, *args[at + 1 :])


class _Stream:
    """A counted generator: what filters such as `map` give."""

    def __init__(self, items: _Counted) -> None:
        self._items = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._items)
