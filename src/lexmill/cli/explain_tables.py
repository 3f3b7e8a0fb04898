"""How `lexmill explain` prints attention and vectors on a terminal or in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lexmill.inference.explain import AttentionMap, AttentionView
    from lexmill.inference.meaning import WordInTexts

BAR = 16  # characters of the longest bar
CELL = 4  # characters of a matrix cell at least
SHADES = " ░▒▓█"


def show_all(view: AttentionView, screen: Any) -> None:
    """A line for each word with its three strongest targets, and the matrix if it fits the width."""
    from rich.table import Table
    from rich.text import Text

    most = max(float(view.weights.max(initial=0)), 1e-6)
    length = BAR // 2 if screen.width >= 100 else 3
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("word", no_wrap=True)
    for place in range(min(3, len(view.keys))):
        table.add_column("looks most at" if place == 0 else "then at", no_wrap=True)
    for row, label in enumerate(view.query_labels):
        cells = [
            Text(f"{_percent(look.weight):>5} ", style="dim")
            + Text(f"{_bar(look.weight / most, length):<{length}} ", style="not dim cyan")
            + Text(_cut(look.text, 10), style="not dim bold" if place == 0 else "not dim")
            for place, look in enumerate(view.looks(row)[:3])
        ]
        table.add_row(Text(_cut(label, 10)), *cells)
    screen.print(Text(f"Shown: {view.title}.", style="dim"))
    screen.print(table)
    show_matrix(view, screen)


def show_matrix(view: AttentionView, screen: Any) -> None:
    """The matrix in per cent, shaded by signs and not by colour alone; nothing if it is too wide."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    columns = [_cut(label, 8) for label in view.key_labels]
    rows = [_cut(label, 12) for label in view.query_labels]
    widths = [max(CELL, cell_len(label)) for label in columns]
    if sum(widths) + len(widths) + max(map(cell_len, rows)) + 2 > screen.width:
        return
    most = max(float(view.weights.max(initial=0)), 1e-6)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for label, width in zip(columns, widths):
        table.add_column(Text(label), justify="right", min_width=width, no_wrap=True)
    for label, weights in zip(rows, view.weights):
        cells = []
        for weight in weights:
            share = float(weight) / most
            shade = SHADES[min(4, round(4 * share))]
            cells.append(Text(f"{shade}{100 * float(weight):.0f}", style="bold" if share > 0.75 else ""))
        table.add_row(Text(label), *cells)
    screen.print(Text("\nRows look at columns, per cent:", style="dim"))
    screen.print(table)


def show_word(attention: AttentionMap, view: AttentionView, rows: Sequence[int], screen: Any) -> None:
    """Where one word looks in full: the view, the rollout, and the strongest head of each pair."""
    from rich.table import Table
    from rich.text import Text

    rollout = None
    if attention.kind != "cross":
        rollout = attention.view(
            "rollout", special=any(piece.special for piece in (*view.queries, *view.keys))
        )
    for row in rows:
        query = attention.queries.index(view.queries[row])
        looks = view.looks(row)
        screen.print(
            Text(f"“{view.query_labels[row]}” looks most at “{looks[0].text}” ", style="bold")
            + Text(f"({_percent(looks[0].weight).strip()})", style="bold")
        )
        hidden = float(view.hidden[row])
        note = (
            f" Special tokens take {100 * hidden:.0f} %; they are hidden, and the rest counts as 100 %."
            if hidden > 0.005
            else ""
        )
        screen.print(Text(f"Shown: {view.title}.{note}", style="dim"))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("looks at", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("weight", justify="right")
        if rollout:
            table.add_column("rollout", justify="right")
        table.add_column("strongest head")
        for look in looks:
            layer, head, weight = attention.strongest_head(query, attention.keys.index(view.keys[look.index]))
            cells = [Text(look.text), Text(_bar(look.weight / max(looks[0].weight, 1e-6), BAR), style="cyan")]
            cells.append(Text(_percent(look.weight)))
            if rollout:
                cells.append(Text(_percent(float(rollout.weights[row, look.index]))))
            table.add_row(*cells, Text(f"layer {layer}, head {head}: {_percent(weight).strip()}"))
        screen.print(table)


def show_meaning(found: WordInTexts, screen: Any) -> None:
    """The cosines of a word's vectors, a row a layer and a column a pair of texts."""
    import math

    from rich.table import Table
    from rich.text import Text

    for number, text in enumerate(found.texts, 1):
        screen.print(Text(f"{number}. {text}"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layer", justify="right")
    for a, b in found.pairs:
        table.add_column(f"texts {a + 1} and {b + 1}", no_wrap=True)
    table.add_column("other words", justify="right")
    for layer, (matrix, other) in enumerate(zip(found.similarity, found.baseline)):
        cells = [
            Text(f"{matrix[a, b]:.3f} ") + Text(_bar(float(matrix[a, b]), 12), style="cyan")
            for a, b in found.pairs
        ]
        table.add_row(str(layer), *cells, "" if math.isnan(other) else f"{other:.3f}")
    screen.print(
        Text(
            f"\nHow alike the vectors of “{found.word}” are (cosine; layer 0 is the embedding):", style="dim"
        )
    )
    screen.print(table)
    screen.print(
        Text("“other words”: the mean of two different words, one from each of two texts.", style="dim")
    )


def _bar(share: float, width: int) -> str:
    """A bar of at most `width` characters, in eighths of a character."""
    eighths = round(8 * width * min(max(share, 0), 1))
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


def _percent(weight: float) -> str:
    return f"{100 * weight:.0f} %" if weight >= 0.0995 else f"{100 * weight:.1f} %"


def _cut(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
