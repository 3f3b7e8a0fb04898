"""Fragments of HTML: escaped text, figures, tables. Knows nothing of runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lexmill.page import escaped
from lexmill.progress import format_duration

ABSENT = '<span class="absent">not made</span>'
MOST_ROWS = 200  # of a table
MOST_CHARACTERS = 4000  # of one text


def show_any(value: Any, depth: int = 0) -> str:
    """Any JSON value: a dict as pairs, a list of dicts as a table, the rest as text."""
    if not is_nested(value):
        return show_value(value)
    if depth > 5:
        return f"<code>{escaped(shortened(json.dumps(value, ensure_ascii=False, default=str)))}</code>"
    if isinstance(value, dict):
        items = list(value.items())
        pairs = "".join(
            f"<dt>{escaped(as_words(str(name)))}</dt><dd>{show_any(inner, depth + 1)}</dd>"
            for name, inner in items[:MOST_ROWS]
        )
        left = (
            f'<p class="note">{len(items) - MOST_ROWS:,} more are left out.</p>'
            if len(items) > MOST_ROWS
            else ""
        )
        return f'<dl class="pairs">{pairs}</dl>{left}'
    if value and all(isinstance(row, dict) for row in value):
        return html_table("values", value, depth + 1)
    if not any(map(is_nested, value)):
        return ", ".join(show_value(item) for item in value[:MOST_ROWS])
    return "".join(f"<div>{show_any(item, depth + 1)}</div>" for item in value[:MOST_ROWS])


def html_table(label: str, rows: Sequence[Mapping[str, Any]], depth: int = 0) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    numbers = {
        name for name in names if all(is_number(row[name]) for row in rows if row.get(name) is not None)
    }
    kind = {name: ' class="number"' if name in numbers else "" for name in names}
    head = "".join(f'<th scope="col"{kind[name]}>{escaped(as_words(str(name)))}</th>' for name in names)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{kind[name]}>{show_any(row[name], depth + 1) if row.get(name) is not None else ''}</td>"
            for name in names
        )
        + "</tr>"
        for row in rows[:MOST_ROWS]
    )
    left = (
        f'<p class="note">{len(rows) - MOST_ROWS:,} more are left out.</p>' if len(rows) > MOST_ROWS else ""
    )
    return scrolled(label, f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>") + left


def scrolled(label: str, table: str, kind: str = "") -> str:
    """A table in a box that scrolls sideways on a narrow screen, also by keyboard."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(label)}">'
        f'<table class="{f"data {kind}".strip()}">{table}</table></div>'
    )


def show_value(value: Any, short: bool = False) -> str:
    """One plain JSON value as HTML."""
    if value is None:
        return '<span class="absent">none</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        return f"{value:.3g}" if short and isinstance(value, float) else show_number(value)
    text = str(value)
    if re.fullmatch(r"[0-9a-fA-F]{24,}", text):
        return f'<code title="{text}">{text[:12]}…</code>'
    return escaped(shortened(text))


def show_number(value: Any) -> str:
    """Whole numbers with separators, others with five digits."""
    if not is_number(value):
        return escaped(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 10000 else f"{value:.5g}"


def show_seconds(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 9.95 else format_duration(seconds)


def as_words(name: str) -> str:
    words = name.replace("_", " ")
    return {"license": "licence", "sha256": "SHA-256", "cpu": "CPU"}.get(words, words)


def shortened(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"


def is_nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    return is_number(value) and abs(value) <= 1e300  # also false for NaN


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
