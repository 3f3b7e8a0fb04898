"""`lexmill merge`: an adapter and its base as one plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli.options import Json, Out, Quiet, begin_computing, make_progress, print_json


def merge(
    adapter: Annotated[Path, typer.Argument(help="An adapter directory.", metavar="ADAPTER")],
    out: Out,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="Its model, if not where the adapter says.", show_default=False),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto stores weights as the base does; f32, f16 and bf16 convert.")
    ] = "auto",
    as_trained: Annotated[
        bool,
        typer.Option("--as-trained", help="Merge into the 8 or 4 bits that the adapter learned on."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Rows to measure the loss on, before and after.", show_default=False),
    ] = None,
    task: Annotated[str, typer.Option("--task", help="Of the rows.")] = "chat",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter and its base as a plain model directory, and say what rounding cost.

    With --data the loss is measured as the adapter was trained, unmerged, and merged. Of a folder that
    'lexmill prepare' wrote the validation split counts; of a file every row.
    """
    begin_computing()
    from lexmill.inference.language_model import find_model
    from lexmill.model.adapter_files import AdapterDirectory
    from lexmill.runtimes.merge import merge_adapter

    opened = AdapterDirectory.open(adapter, find_model(base) if base else None)
    progress = make_progress(quiet or json)
    merged = merge_adapter(opened, out, dtype=dtype, as_trained=as_trained, progress=progress)
    losses: dict[str, float] = {}
    if data is not None:
        from lexmill.finetune.compare import adapter_losses

        losses = adapter_losses(opened, merged.model, data, task, progress)
    if json:
        print_json(_figures(merged) | {"loss": losses})
        return
    typer.echo(f"written to {out}")
    for line in merged.said():
        typer.echo(line)
    for name, loss in losses.items():
        typer.echo(f"loss {name}: {loss:.5f}")


def _figures(merged: Any) -> dict[str, Any]:
    return {
        "model": str(merged.model.path),
        "dtypes": list(merged.dtypes),
        "largest_error": merged.largest_error,
        "lost": merged.lost,
        "quantised": merged.quantised,
        "as_trained": merged.as_trained,
    }
