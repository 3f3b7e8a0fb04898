"""`lexmill report`: one page about a run, or one that compares several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Json, print_json


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="A run directory, such as runs/quickstart; several are compared. To compare, "
            "a folder that 'lexmill pretrain' or 'finetune' writes is a run too.",
            metavar="RUN",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The HTML file [default: RUN/report.html; of several, compare.html]."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a run's report again, or compare several runs: one self-contained HTML file.

    A run that is still training can be compared too. With --json, the table of the runs and the
    settings in which they differ are printed, and a page is written only where --out says.
    """
    from lexmill.errors import FileError

    if len(runs) > 1 or json:
        from lexmill.recipe.compare import write_comparison
        from lexmill.recipe.compare_data import comparison, read_runs

        read = read_runs(runs)
        if json:
            print_json(comparison(read))
    if json and not out:
        return
    if len(runs) > 1:
        written = write_comparison(read, out or Path("compare.html"))
    else:
        from lexmill.recipe.report import write_report

        run = runs[0]
        if not run.is_dir():
            raise FileError(
                f"{run}: there is no such run directory.", "Run a recipe first: lexmill run RECIPE"
            )
        written = write_report(run, out or run / "report.html")
    if not json:
        typer.echo(f"written to {written}")
