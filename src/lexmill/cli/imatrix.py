"""`lexmill imatrix`: which columns of a model's matrices matter, for better quantised files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Model, Out, Quiet, begin_computing, make_progress


def imatrix(
    model: Model,
    data: Annotated[
        Path, typer.Option("--data", help="A text file, UTF-8: text like what the model is for.")
    ],
    out: Out,
    chunk_size: Annotated[int, typer.Option("--chunk-size", help="Tokens in a chunk.", min=1)] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", help="At most so many chunks.", min=1, show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Collect an importance matrix of a decoder, for export gguf --imatrix and for llama.cpp.

    Written as GGUF, or in the older form where the name ends in .dat.
    """
    begin_computing()
    from lexmill.data.decoding import read_text
    from lexmill.evaluate.importance import collect_importance
    from lexmill.formats.imatrix import write_imatrix
    from lexmill.inference.language_model import load

    found = collect_importance(
        load(model),
        read_text(data),
        chunk_size=chunk_size,
        chunks=chunks,
        dataset=data.name,
        progress=make_progress(quiet),
    )
    write_imatrix(out, found)
    typer.echo(
        f"written to {out} ({len(found.entries)} matrices, {found.chunks} chunks of {found.chunk_size} tokens)"
    )
