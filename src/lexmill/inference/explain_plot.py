"""Attention as pictures for papers and slides: one matrix, or all layers and heads, as SVG or PNG.

Drawn by matplotlib, which is optional: `pip install "lexmill[plots]"`.
"""

from __future__ import annotations

import functools
import io
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from lexmill.errors import MissingPackageError
from lexmill.inference.explain import AttentionMap, AttentionView

Format = Literal["svg", "png"]
INK, SOFT, MARK = "#1f2225", "#5c6269", "#b4541a"
MOST_NUMBERS = 16  # columns of a matrix whose cells still have room for figures
# Tried first, because they cover most of the world's scripts; any other installed font comes after them.
WIDE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
    "Arial Unicode MS",
)


def plot_view(
    view: AttentionView, format: Format, caption: str = "", marked: Sequence[int] = ()
) -> tuple[bytes, str]:
    """One matrix with the words on both sides.

    Args:
        view: what `AttentionMap.view` gave.
        format: "svg" (letters as outlines, so it looks the same everywhere) or "png" (160 dpi).
        caption: above the picture, before the view's title.
        marked: the rows of a chosen word, to be framed.

    Returns:
        The file's bytes, and a warning for the user: "" unless no installed font has some letter.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    rows, columns = view.query_labels, view.key_labels
    figure_class, rectangle = _matplotlib()
    fonts, warning = _fonts("".join([*rows, *columns, caption]))
    side = 0.42 if len(columns) <= MOST_NUMBERS else 0.2
    # long names of columns stand upright above the picture
    upright = (
        0.085 * max(map(len, columns), default=0) if side > 0.3 else 0.06 * max(map(len, columns), default=0)
    )
    size = (max(3.6, 1.6 + side * len(columns)), max(2.6, 1.5 + upright + side * len(rows)))
    figure = figure_class(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    top = max(float(view.weights.max(initial=0)), 1e-6)
    image = axes.imshow(view.weights, cmap="Blues", vmin=0, vmax=top, aspect="equal")
    font = {"family": fonts, "parse_math": False}
    axes.set_xticks(range(len(columns)), columns, rotation=90, **font)
    axes.set_yticks(range(len(rows)), rows, **font)
    for row in marked:
        axes.add_patch(rectangle((-0.5, row - 0.5), len(columns), 1, fill=False, edgecolor=MARK, linewidth=2))
        axes.get_yticklabels()[row].set(color=MARK, fontweight="bold")
    axes.tick_params(length=0, labelsize=10 if side > 0.3 else 7)
    axes.xaxis.tick_top()
    for edge in axes.spines.values():
        edge.set_visible(False)
    if len(columns) <= MOST_NUMBERS:
        for (row, column), weight in _cells(view):
            color = "white" if weight > 0.6 * top else INK
            axes.text(column, row, f"{100 * weight:.0f}", ha="center", va="center", color=color, fontsize=9)
    figure.suptitle(_titled(caption, view.title, size[0]), fontsize=10, color=INK, **font)
    axes.set_xlabel("rows look at columns, per cent", color=SOFT, fontsize=8)
    if len(columns) > MOST_NUMBERS:
        figure.colorbar(image, ax=axes, shrink=0.6, format=lambda value, _: f"{100 * value:.0f}")
    return _file(figure, format), warning


def plot_grid(
    attention: AttentionMap, format: Format, caption: str = "", special: bool = False
) -> tuple[bytes, str]:
    """Every head of every layer as a small matrix; arguments and result as of `plot_view`."""
    figure_class, _ = _matplotlib()
    fonts, warning = _fonts(caption)
    layers, heads = attention.layers, attention.heads
    figure = figure_class(figsize=(1 + 0.85 * heads, 1 + 0.95 * layers), layout="constrained")
    squares = figure.subplots(layers, heads, squeeze=False)
    for layer in range(1, layers + 1):
        for head in range(1, heads + 1):
            axes = squares[layer - 1][head - 1]
            view = attention.view(layer=layer, head=head, special=special)
            # what special tokens take stays visible as paleness
            weights = view.weights * (1 - view.hidden[:, None])
            axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            for edge in axes.spines.values():
                edge.set_color("#cccccc")
            if layer == 1:
                axes.set_title(f"head {head}" if head == 1 else str(head), fontsize=8, color=SOFT)
            if head == 1:
                axes.set_ylabel(
                    f"layer {layer}" if layer == 1 else str(layer),
                    fontsize=8,
                    color=SOFT,
                    rotation=0,
                    ha="right",
                )
    hidden = "" if special else "; pale heads look at special tokens"
    text = _titled(caption, f"all layers and heads, rows look at columns{hidden}", 1 + 0.85 * heads)
    figure.suptitle(text, fontsize=10, color=INK, family=fonts, parse_math=False)
    return _file(figure, format), warning


def _titled(caption: str, title: str, inches: float) -> str:
    """The caption in at most two lines that fit the width, and the title below it."""
    lines = textwrap.wrap(caption, max(20, int(inches * 11)), max_lines=2, placeholder=" …")
    return "\n".join([*lines, *textwrap.wrap(title, max(20, int(inches * 11)))])


def _cells(view: AttentionView) -> Any:
    return (
        ((row, column), float(view.weights[row, column]))
        for row in range(len(view.queries))
        for column in range(len(view.keys))
    )


def _matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise MissingPackageError("matplotlib", "for --svg and --png", "plots") from error
    return Figure, Rectangle


def _file(figure: Any, format: Format) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    # The same input gives the same bytes: no date, and ids that do not change from run to run.
    with (
        matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "lexmill"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # said once, by `_fonts`
        metadata = {"Date": None} if format == "svg" else {"Software": None}
        figure.savefig(buffer, format=format, dpi=160, metadata=metadata, facecolor="white")
    return buffer.getvalue()


def _fonts(text: str) -> tuple[list[str], str]:
    """Fonts that together have every letter of `text`, and a warning where there are none."""
    from matplotlib import font_manager

    chosen = ["DejaVu Sans"]
    missing = {
        ord(character)
        for character in text
        if not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf")
    }
    missing -= _letters(font_manager.findfont("DejaVu Sans"))
    if not missing:
        return chosen, ""
    installed = {
        entry.name: entry.fname
        for entry in font_manager.fontManager.ttflist
        if "Last Resort" not in entry.name  # has every letter, as a box
    }
    names = [name for name in WIDE_FONTS if name in installed]
    for name in [*names, *(name for name in sorted(installed) if name not in names)]:
        if found := missing & _letters(installed[name]):
            chosen.append(name)
            missing -= found
        if not missing:
            return chosen, ""
    shown = " ".join(map(chr, sorted(missing)[:8]))
    return (
        chosen,
        f"No installed font has {shown}: these stay empty boxes in the picture. "
        "Install a font that has them, such as Noto Sans CJK, or write --html instead.",
    )


@functools.lru_cache(maxsize=64)
def _letters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # a damaged font file is as good as none
        return frozenset()
