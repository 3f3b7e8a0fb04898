"""`lexmill report`: one page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run directory, such as runs/quickstart.", metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file [default: RUN/report.html].")
    ] = None,
) -> None:
    """Write a run's report again: one self-contained HTML file."""
    from lexmill.errors import FileError
    from lexmill.recipe.report import write_report

    if not run.is_dir():
        raise FileError(f"{run}: there is no such run directory.", "Run a recipe first: lexmill run RECIPE")
    typer.echo(f"written to {write_report(run, out or run / 'report.html')}")
