"""`lexmill classify`: which label fits a text?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Json, Model, begin_computing, console, print_json


def classify(
    model: Model,
    texts: Annotated[list[str] | None, typer.Argument(help="One text or more.", show_default=False)] = None,
    second: Annotated[
        list[str] | None,
        typer.Option("--second", help="Of a pair the other text; once for each text.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="A file with a text a line.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """The labels of texts, or of pairs of texts, with their probabilities."""
    begin_computing()
    from lexmill.data.decoding import read_text
    from lexmill.errors import ConfigError
    from lexmill.inference.language_model import load

    asked = list(texts or [])
    if file is not None:
        asked += [line for line in read_text(file).splitlines() if line.strip()]
    if not asked:
        raise ConfigError("There is no text to classify.", "lexmill classify MODEL TEXT, or --file FILE.")
    found = load(model).classify(asked, second or None)
    if json:
        others: list[str | None] = list(second) if second else [None] * len(asked)
        print_json(
            [
                {"text": text, **({"second": other} if other is not None else {}), "labels": labels}
                for text, other, labels in zip(asked, others, found)
            ]
        )
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("label", style="bold")
    table.add_column("probability", justify="right")
    table.add_column("others", style="dim")
    table.add_column("text", overflow="ellipsis", max_width=60, no_wrap=True)
    for text, labels in zip(asked, found):
        (best, probability), *rest = labels.items()
        others_shown = ", ".join(f"{label} {share:.3f}" for label, share in rest[:3])
        table.add_row(Text(best), f"{probability:.4f}", Text(others_shown), Text(text))
    console().print(table)
