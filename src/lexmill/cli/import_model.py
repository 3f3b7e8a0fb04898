"""`lexmill import`: a model made by others, as a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Out, Quiet, make_progress


def import_model(
    source: Annotated[
        Path,
        typer.Argument(help="A GGUF file, or a Hugging Face directory; or an adapter.", metavar="FILE|DIR"),
    ],
    out: Out,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="Of an adapter: the model that it is for.", show_default=False),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="auto loses nothing; f32, f16 and bf16 convert."),
    ] = "auto",
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Cut larger weights into files of at most this size.")
    ] = "5GB",
    quiet: Quiet = False,
) -> None:
    """Make a model directory of a GGUF file or of a Hugging Face directory.

    The result opens in every verb of lexmill, and in transformers. Models of the shapes of Llama,
    Qwen2, Qwen3, BERT and T5 can be imported; of a GGUF file nothing is lost, and a feature that
    lexmill does not have is an error. With --base an adapter is imported: a GGUF file, or PEFT's folder.
    """
    from lexmill.formats.safetensors_writing import parse_size
    from lexmill.runtimes import import_model as importing

    if base is not None:
        from lexmill.inference.language_model import find_model
        from lexmill.runtimes.gguf_adapter import import_adapter

        adapter = import_adapter(source, find_model(base), out)
        typer.echo(f"written to {out} (an adapter of {adapter.adapter.parameters:,} weights for {base})")
        return
    model = importing.import_model(
        source, out, dtype=dtype, shard_bytes=parse_size(shard_size), progress=make_progress(quiet)
    )
    typer.echo(f"written to {out} ({model.config.family}, {model.config.parameters:,} weights)")
