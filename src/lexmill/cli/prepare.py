"""`lexmill prepare`: raw files to documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Json, Out, Quiet, make_progress, print_json


def prepare(
    inputs: Annotated[
        list[str], typer.Argument(help="Files, folders or patterns: .txt .jsonl .csv .parquet .html .md")
    ],
    out: Out,
    kind: Annotated[
        str, typer.Option("--kind", help="'text', or 'chat' for rows with \"messages\".")
    ] = "text",
    split: Annotated[
        str,
        typer.Option("--split", help="'file', 'blank-lines', or an expression for a document's first line."),
    ] = "file",
    unwrap: Annotated[
        bool, typer.Option("--unwrap", help="Join hard-wrapped lines into paragraphs.")
    ] = False,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of documents kept for validation.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Another seed splits otherwise.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read raw files, clean them, drop duplicates, split, and write Parquet with a manifest."""
    from lexmill.data.prepare import PrepareConfig, SourceConfig
    from lexmill.data.prepare import prepare as run_prepare

    sources = tuple(SourceConfig(path=path, kind=kind, split=split, unwrap=unwrap) for path in inputs)
    config = PrepareConfig(sources=sources, validation_fraction=validation_fraction, seed=seed)
    result = run_prepare(config, out, Path("."), make_progress(quiet or json))
    if json:
        print_json({"files": result.files, "counts": result.counts, "dropped": result.dropped})
        return
    for name, kinds in result.counts.items():
        for kind, counts in kinds.items():
            if counts["documents"]:
                typer.echo(
                    f"{name}: {counts['documents']:,} {kind} documents, {counts['characters']:,} characters"
                )
    for reason, count in result.dropped.items():
        typer.echo(f"dropped: {count:,} ({reason})")
    typer.echo(f"written to {out}")
