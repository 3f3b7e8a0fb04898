"""`lexmill pretrain`: a model from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Json, Out, Quiet, Set, begin_computing, make_progress, print_json


def pretrain(
    documents: Annotated[Path, typer.Argument(help="The folder that 'lexmill prepare' wrote.")],
    tokenizer: Annotated[
        Path, typer.Option("--tokenizer", help="The folder that 'lexmill tokenizer train' wrote.")
    ],
    out: Out,
    steps: Annotated[int | None, typer.Option(help="Budget in steps.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget in tokens.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes.")] = None,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a decoder from nothing. Interrupted, the same command goes on.

    Every setting of a recipe's [pretrain] table can be given: --set model.width=256 --set rows=16
    """
    begin_computing()
    from lexmill.config import apply_overrides, from_mapping
    from lexmill.devices import process_rank
    from lexmill.pretrain.stage import PretrainConfig
    from lexmill.pretrain.stage import pretrain as run_pretrain
    from lexmill.recipe.steps import continue_text
    from lexmill.tokenizer.tokenizer import Tokenizer

    given = {"steps": steps, "tokens": tokens, "minutes": minutes}
    table = {name: value for name, value in given.items() if value is not None}
    config = from_mapping(PretrainConfig, apply_overrides(table, overrides or ()), "pretrain")
    directory, result = run_pretrain(
        config,
        documents,
        Tokenizer.load(tokenizer),
        out,
        sample=continue_text,
        progress=make_progress(quiet or json),
    )
    if process_rank():
        return  # the first process speaks for all
    if json:
        print_json({**vars(result), "model": str(directory.path)})
    else:
        typer.echo(
            f"{result.steps:,} steps, {result.tokens:,} tokens, {result.seconds:.0f} s; model in {directory.path}"
        )
