"""`lexmill fill`: what may stand in a gap."""

from __future__ import annotations

from typing import Annotated

import typer

from lexmill.cli.options import AnyModel, Backend, Json, begin_computing, console, print_json


def fill(
    model: AnyModel,
    text: Annotated[
        str,
        typer.Argument(help="A text with a gap: [MASK] for an encoder, <extra_id_0> for an encoder–decoder."),
    ],
    top: Annotated[int, typer.Option("--top", help="How many answers.", min=1)] = 5,
    beams: Annotated[
        int, typer.Option("--beams", help="Encoder–decoder: texts that the search keeps.", min=1)
    ] = 8,
    backend: Backend = "auto",
    json: Json = False,
) -> None:
    """The likeliest words for a gap in a text, with their probabilities.

    An encoder fills one token at [MASK]; an encoder–decoder several words at each of <extra_id_0>, <extra_id_1> …
    """
    begin_computing()
    from lexmill.inference.language_model import load

    loaded = load(model, backend=backend)
    if loaded.config.shape == "encoder_decoder":
        found = loaded.fill_spans(text, beams=beams, top=top)
    else:
        found = loaded.fill_mask(text, top)
    if json:
        print_json({"text": text, "fillings": [vars(one) for one in found]})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("probability", justify="right")
    table.add_column("filling", style="bold")
    table.add_column("text")
    for one in found:
        table.add_row(f"{one.probability:.4f}", one.text, one.sentence)
    console().print(table)
