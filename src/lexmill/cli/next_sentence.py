"""`lexmill next-sentence`: does one text follow another?"""

from __future__ import annotations

from typing import Annotated

import typer

from lexmill.cli.options import Json, Model, begin_computing, print_json


def next_sentence(
    model: Model,
    first: Annotated[str, typer.Argument(help="The first text.")],
    second: Annotated[str, typer.Argument(help="The text that may follow it.")],
    json: Json = False,
) -> None:
    """The probability that the second text follows the first, by a model with a next-sentence head."""
    begin_computing()
    from lexmill.inference.language_model import load

    probability = load(model).next_sentence(first, second)
    if json:
        print_json({"first": first, "second": second, "probability": probability})
    else:
        typer.echo(f"{probability:.4f}  {'follows' if probability >= 0.5 else 'does not follow'}")
