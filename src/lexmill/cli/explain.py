"""`lexmill explain`: see what attention does, and how a word's meaning depends on its text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli.options import Json, Model, begin_computing, console, print_json

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="See where words look, and how their vectors change."
)

Html = Annotated[Path | None, typer.Option("--html", help="Write a page that explores it; one file.")]


@app.command()
def attention(
    model: Model,
    text: Annotated[str, typer.Argument(help="The text to look into.")],
    word: Annotated[str | None, typer.Option("--word", "-w", help="Only where this word looks.")] = None,
    view: Annotated[
        str | None,
        typer.Option("--view", help="mean, head, rollout or strongest [default: mean; head with --head]."),
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", help="From 1; 'all' draws every head into --svg and --png.")
    ] = None,
    head: Annotated[int | None, typer.Option("--head", help="From 1; needs --layer.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="A second text, for the decoder of an encoder-decoder.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option("--part", help="encoder, decoder or cross [default: cross with --target]."),
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Show special tokens such as [CLS] too.")
    ] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Tokens instead of words.")] = False,
    html: Html = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write the matrix as SVG.")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Write the matrix as PNG.")] = None,
    json: Json = False,
) -> None:
    """Where each word of a text looks, by layer and head and together."""
    begin_computing()
    from lexmill.cli import explain_tables
    from lexmill.inference.explain_page import attention_page
    from lexmill.inference.language_model import load

    number = _layer(layer)
    name = view or ("head" if head is not None else "mean")
    loaded: Any = load(model)
    whole = loaded.attention(text, target=target)  # of tokens
    parts = whole.part(part or ("cross" if target is not None else whole.kind))
    shown = parts if tokens else parts.words()
    seen = shown.view(name, layer=number, head=head, special=special)
    rows: list[int] = shown.rows_of(word, seen) if word is not None else []
    if html:
        page = attention_page(
            whole,
            part=parts.kind,
            word=word,
            view=name,
            layer=number,
            head=head,
            special=special,
            tokens=tokens,
            model=_name(model),
        )
        _write(html, page.encode("utf-8", "replace"), json)
    for path, format in ((svg, "svg"), (png, "png")):
        if path:
            _draw(path, format, shown, seen, rows, layer == "all", special, json)
    if json:
        print_json(_told(whole, shown, seen, rows, tokens))
    elif word is not None:
        explain_tables.show_word(shown, seen, rows, console())
    elif not (html or svg or png):
        explain_tables.show_all(seen, console())


@app.command()
def word(
    model: Model,
    word: Annotated[str, typer.Argument(help="A word that each text has.")],
    texts: Annotated[list[str], typer.Argument(help="Two texts or more.", metavar="TEXT...")],
    html: Html = None,
    json: Json = False,
) -> None:
    """How alike a word's vectors are in several texts, layer by layer."""
    begin_computing()
    from lexmill.cli.explain_tables import show_meaning
    from lexmill.inference.explain_page import word_page
    from lexmill.inference.language_model import load
    from lexmill.inference.meaning import check_word, word_in_texts

    loaded: Any = load(model)
    check_word(loaded.tokenizer, word, texts)  # before anything is computed
    found = word_in_texts(loaded.tokenizer, word, texts, [loaded.hidden_states(text) for text in texts])
    if html:
        _write(html, word_page(found, _name(model)).encode("utf-8", "replace"), json)
    if json:
        print_json(found.to_json())
    else:
        show_meaning(found, console())


def _layer(layer: str | None) -> int | None:
    if layer is None or layer == "all":
        return None
    try:
        return int(layer)
    except ValueError:
        from lexmill.errors import ConfigError

        raise ConfigError(f"--layer {layer!r} is no layer.", "Give a number from 1, or 'all'.") from None


def _told(whole: Any, shown: Any, seen: Any, rows: list[int], tokens: bool) -> dict[str, Any]:
    """All maps, the chosen view, and for a chosen word its ranking."""
    from lexmill.inference.explain import rounded

    value = (whole if tokens else whole.words()).to_json()
    value["view"] = {
        "kind": shown.kind,
        "title": seen.title,
        "queries": seen.query_labels,
        "keys": seen.key_labels,
        "weights": rounded(seen.weights),
        "special_hidden": rounded(seen.hidden),
    }
    if rows:
        value["looks"] = [
            {
                "query": seen.query_labels[row],
                "start": seen.queries[row].start,
                "at": [_look(shown, seen, row, look) for look in seen.looks(row)],
            }
            for row in rows
        ]
    return value


def _look(shown: Any, seen: Any, row: int, look: Any) -> dict[str, Any]:
    query, key = shown.queries.index(seen.queries[row]), shown.keys.index(seen.keys[look.index])
    layer, head, weight = shown.strongest_head(query, key)
    return {
        "text": look.text,
        "start": seen.keys[look.index].start,
        "weight": round(look.weight, 6),
        "strongest_head": {"layer": layer, "head": head, "weight": round(weight, 6)},
    }


def _draw(
    path: Path, format: Any, shown: Any, seen: Any, rows: list[int], grid: bool, special: bool, quiet: bool
) -> None:
    from lexmill.inference.explain_plot import plot_grid, plot_view

    caption = f"{shown.text} → {shown.key_text}" if shown.kind == "cross" else shown.text
    if grid:
        picture, warning = plot_grid(shown, format, caption, special)
    else:
        picture, warning = plot_view(seen, format, caption, rows)
    if warning:
        typer.echo(f"warning: {warning}", err=True)
    _write(path, picture, quiet)


def _write(path: Path, content: bytes, quiet: bool) -> None:
    from lexmill.files import atomic_write

    with atomic_write(path, "wb") as file:
        file.write(content)
    typer.echo(f"written to {path} ({len(content) / 1e3:,.0f} KB)", err=quiet)


def _name(model: Path) -> str:
    return model.resolve().name
