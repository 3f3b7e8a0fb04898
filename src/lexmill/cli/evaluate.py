"""`lexmill evaluate`: how good is a model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Json, Model, Quiet, begin_computing, make_progress, print_json


def evaluate(
    model: Model,
    documents: Annotated[Path, typer.Argument(help="The folder that 'lexmill prepare' wrote.")],
    base: Annotated[Path | None, typer.Option("--base", help="Another model to compare with.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Loss, perplexity and bits per byte on held-out text; accuracy of replies to held-out questions."""
    begin_computing()
    from lexmill.evaluate.stage import EvaluateConfig
    from lexmill.evaluate.stage import evaluate as run_evaluate
    from lexmill.inference.language_model import load

    scores = run_evaluate(
        EvaluateConfig(),
        load(model),
        documents,
        base=load(base) if base else None,
        progress=make_progress(quiet or json),
    )
    if json:
        print_json(scores)
        return
    for part in ("text", "replies"):
        for name, figures in scores[part].items():
            which = {"before": "base", "after": "model", "seen_after": "model, questions seen in training"}[
                name
            ]
            told = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in figures.items())
            typer.echo(f"{part}, {which}: {told}")
