"""`lexmill embed`: texts as vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import AnyModel, Backend, Json, begin_computing, console, print_json


def embed(
    model: AnyModel,
    texts: Annotated[list[str], typer.Argument(help="One text or more.")],
    pooling: Annotated[
        str | None,
        typer.Option(
            "--pooling",
            help="mean, cls, last or max: how a text's tokens become one vector [default: the model's own].",
            show_default=False,
        ),
    ] = None,
    normalise: Annotated[bool, typer.Option("--normalise", help="Make every vector one long.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the vectors as a NumPy file (.npy).")
    ] = None,
    backend: Backend = "auto",
    json: Json = False,
) -> None:
    """A vector for each text; without --json or --out, how alike the texts are (cosines)."""
    begin_computing()
    import numpy as np

    from lexmill.files import atomic_write
    from lexmill.inference.language_model import load

    opened = load(model, backend=backend)
    pooling = pooling or opened.pooling
    vectors = opened.embed(texts, pooling=pooling, normalise=normalise)
    if out is not None:
        with atomic_write(out, "wb") as file:
            np.save(file, vectors)
        typer.echo(f"{len(vectors):,} vectors of {vectors.shape[1]:,} numbers ({pooling}) in {out}")
    if json:
        print_json({"pooling": pooling, "texts": texts, "vectors": vectors.tolist()})
    elif out is None:
        _show(texts, vectors, pooling, console())


def _show(texts: list[str], vectors, pooling: str, screen) -> None:  # type: ignore[no-untyped-def]
    import numpy as np
    from rich.table import Table

    units = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    cosines = units @ units.T
    table = Table(
        title=f"{vectors.shape[1]:,} numbers a text, pooling: {pooling}; cosines", box=None, pad_edge=False
    )
    table.add_column("", justify="right")
    table.add_column("text", overflow="ellipsis", max_width=48, no_wrap=True)
    for number in range(1, len(texts) + 1):
        table.add_column(str(number), justify="right")
    for number, (text, row) in enumerate(zip(texts, cosines), 1):
        table.add_row(str(number), text, *(f"{value:.3f}" for value in row))
    screen.print(table)
