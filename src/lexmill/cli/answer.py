"""`lexmill answer`: what does a text say to a question?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Json, Model, begin_computing, print_json


def answer(
    model: Model,
    question: Annotated[str, typer.Argument(help="The question.")],
    context: Annotated[
        str, typer.Option("--context", help="The text that may hold the answer, or a file of it.")
    ],
    json: Json = False,
) -> None:
    """The answer to a question about a text, by a model fine-tuned for it (--task qa).

    An encoder finds the words of the text that answer; other models write an answer.
    """
    begin_computing()
    from lexmill.data.decoding import read_text
    from lexmill.evaluate.scores import ScoreConfig
    from lexmill.evaluate.writing import write_answer
    from lexmill.inference.language_model import load

    path = Path(context)
    # a text may be longer than any name of a file
    is_file = len(context) < 1000 and "\n" not in context and path.is_file()
    text = read_text(path) if is_file else context
    loaded = load(model)
    if loaded.config.shape != "encoder":
        written = write_answer(loaded, question, text, ScoreConfig(max_tokens=128))
        if json:
            print_json({"question": question, "text": written})
        else:
            typer.echo(written)
        return
    found = loaded.answer(question, text)
    if json:
        print_json({"question": question, **vars(found)})
    elif found.text:
        typer.echo(f"{found.text}  ({found.probability:.3f}, characters {found.start:,} to {found.end:,})")
    else:
        typer.echo(
            f"The text does not say. ({found.probability:.3f}; its likeliest words: {found.candidate})"
        )
