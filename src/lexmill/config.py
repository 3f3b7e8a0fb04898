"""Configuration as data: frozen dataclasses filled from TOML, with overrides and clear errors."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lexmill.errors import ConfigError
from lexmill.files import explain_os_errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def read_toml(path: Path | str) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        FileError: it cannot be opened.
        ConfigError: it is not UTF-8 or not TOML; says the line.
    """
    path = Path(path)
    with explain_os_errors(path, "read"):
        raw = path.read_bytes()
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}).", "A recipe is a TOML file."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply overrides such as `pretrain.steps=100` to nested tables.

    The right side is read as a TOML value; what is no TOML value is taken as a string.

    Raises:
        ConfigError: an override has no `=`, an empty key, or leads through something that is no table.
    """
    result = _copy_tables(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        path = [part.strip() for part in key.split(".")]
        if not equals or not all(path):
            raise ConfigError(
                f"--set {override}: not of the form KEY=VALUE.", "For example: --set pretrain.steps=100"
            )
        table = result
        for part in path[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {override}: '{part}' is a value, not a table.")
        table[path[-1]] = _toml_value(text.strip())
    return result


def _copy_tables(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copy_tables(value) if isinstance(value, Mapping) else value for key, value in values.items()
    }


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def suggest(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'steps'?` when something known is near, else the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean '{near[0]}'?" if near else f"Known are: {', '.join(known)}."


def from_mapping(kind: type[T], values: Any, where: str) -> T:
    """Build the dataclass `kind` from a table, checking every key and type.

    Nested dataclasses, tuples of them, optional values and `Literal` choices are understood.

    Args:
        kind: a dataclass; its `__post_init__` may raise `ConfigError` for values out of range.
        values: what TOML or JSON gave.
        where: the dotted path of this table, for messages ("quickstart.toml: pretrain").

    Raises:
        ConfigError: unknown key (with a suggestion), missing key, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a table, found {_describe(values)}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key '{key}'.", suggest(key, fields))
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: the key '{name}' is missing.")
    try:
        return kind(**arguments)
    except ConfigError as error:
        if where in error.message:
            raise
        raise ConfigError(f"{where}: {error.message}", error.hint) from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [argument for argument in arguments if argument is not type(None)]
        for choice in choices[:-1]:
            try:
                return _convert(choice, value, where)
            except ConfigError:
                continue
        return _convert(choices[-1], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(
                f"{where} = {value!r} is not a choice.", suggest(str(value), map(str, arguments))
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {_describe(value)}.")
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{where}: expected {_type_name(hint)}, found {_describe(value)}.")
    return value


def _type_name(hint: type) -> str:
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}.get(
        hint, hint.__name__
    )


def _describe(value: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list"}
    return f"{names.get(type(value), 'a table')} ({value!r})"


def to_mapping(config: Any) -> dict[str, Any]:
    """The reverse of `from_mapping`: plain tables and lists, without keys whose value is None."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return to_mapping(value)
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    items = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {name: plain(value) for name, value in items if value is not None}
