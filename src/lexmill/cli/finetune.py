"""`lexmill finetune`: teach a model to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Json, Model, Out, Quiet, Set, begin_computing, make_progress, print_json


def finetune(
    model: Model,
    documents: Annotated[Path, typer.Argument(help="The folder that 'lexmill prepare --kind chat' wrote.")],
    out: Out,
    steps: Annotated[int | None, typer.Option(help="Budget in steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes.")] = None,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune on conversations, with the loss on the replies only. Interrupted, the same command goes on."""
    begin_computing()
    from lexmill.config import apply_overrides, from_mapping
    from lexmill.devices import process_rank
    from lexmill.finetune.stage import FinetuneConfig
    from lexmill.finetune.stage import finetune as run_finetune
    from lexmill.inference.language_model import find_model
    from lexmill.model.directory import ModelDirectory
    from lexmill.recipe.steps import answer_question

    table = {name: value for name, value in {"steps": steps, "minutes": minutes}.items() if value is not None}
    config = from_mapping(FinetuneConfig, apply_overrides(table, overrides or ()), "finetune")
    base = ModelDirectory.open(find_model(model))
    directory, result = run_finetune(
        config, base, documents, out, reply=answer_question, progress=make_progress(quiet or json)
    )
    if process_rank():
        return  # the first process speaks for all
    if json:
        print_json({**vars(result), "model": str(directory.path)})
    else:
        typer.echo(f"{result.steps:,} steps, {result.seconds:.0f} s; model in {directory.path}")
