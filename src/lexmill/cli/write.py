"""`lexmill translate` and `lexmill summarise`: texts by a model that was fine-tuned for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Json, Model, begin_computing, print_json

Texts = Annotated[
    list[str] | None, typer.Argument(help="The texts; '-' reads standard input.", show_default=False)
]
File = Annotated[Path | None, typer.Option("--file", help="A file that is one text.", show_default=False)]
Lines = Annotated[bool, typer.Option("--lines", help="Each line of the file or input is a text.")]
Beams = Annotated[int, typer.Option("--beams", min=1, help="Above 1: beam search.")]
LengthPenalty = Annotated[
    float, typer.Option("--length-penalty", help="Of beam search; above 1 favours long texts.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Of what is written.")]


def _verb(task: str, most: int, about: str) -> Callable[..., None]:
    """A command that writes with a model of that task, at most so many tokens unless told otherwise."""

    def command(
        model: Model,
        texts: Texts = None,
        file: File = None,
        lines: Lines = False,
        beams: Beams = 4,
        length_penalty: LengthPenalty = 1.0,
        max_tokens: MaxTokens = most,
        json: Json = False,
    ) -> None:
        _write(task, model, _given(texts, file, lines), beams, length_penalty, max_tokens, json)

    command.__name__, command.__doc__ = task, about
    return command


translate = _verb(
    "translate", 256, "Translate texts, in the words of the model's training (--task translate)."
)
summarise = _verb(
    "summarise", 128, "Summarise texts, in the words of the model's training (--task summarise)."
)


def _given(texts: list[str] | None, file: Path | None, lines: bool) -> list[str]:
    from lexmill.data.decoding import read_text
    from lexmill.errors import ConfigError

    if bool(texts) == (file is not None):
        raise ConfigError("Give texts, or a file with --file.", "A text of '-' reads standard input.")
    found = [read_text(file)] if file else [sys.stdin.read() if text == "-" else text for text in texts or ()]
    if lines:
        found = [line for text in found for line in text.splitlines()]
    found = [text.strip() for text in found if text.strip()]
    if not found:
        raise ConfigError("There is no text.")
    return found


def _write(
    task: str, model: Path, texts: list[str], beams: int, length_penalty: float, max_tokens: int, json: bool
) -> None:
    begin_computing()
    from lexmill.evaluate.scores import ScoreConfig
    from lexmill.evaluate.writing import write_texts
    from lexmill.inference.language_model import load

    config = ScoreConfig(beams=beams, length_penalty=length_penalty, max_tokens=max_tokens)
    written = write_texts(task, load(model), texts, config)
    if json:
        print_json([{"text": text, "written": one} for text, one in zip(texts, written, strict=True)])
        return
    for one in written:
        typer.echo(one)
