"""`lexmill export`: a model for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Model, Out, Quiet, make_progress

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Write a model for Hugging Face, llama.cpp or Ollama."
)


@app.command()
def hf(
    model: Model,
    out: Out,
    shard_size: Annotated[
        str | None,
        typer.Option("--shard-size", help="Cut larger weights into files of at most this size, like 5GB."),
    ] = None,
) -> None:
    """A complete Hugging Face directory with a model card."""
    from lexmill.formats.safetensors_writing import parse_size
    from lexmill.inference.language_model import find_model
    from lexmill.runtimes.huggingface import export_huggingface

    export_huggingface(find_model(model), out, shard_bytes=parse_size(shard_size) if shard_size else None)
    typer.echo(f"written to {out}")


@app.command()
def gguf(
    model: Model,
    out: Out,
    type: Annotated[str, typer.Option("--type", help="f32, f16, bf16 or q8_0.")] = "f16",
    quiet: Quiet = False,
) -> None:
    """A GGUF file for llama.cpp."""
    from lexmill.inference.language_model import find_model
    from lexmill.runtimes.llama_cpp import export_gguf

    export_gguf(find_model(model), out, type, make_progress(quiet))
    typer.echo(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB)")


@app.command()
def ollama(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the Modelfile.")],
    type: Annotated[str, typer.Option("--type", help="Type of the GGUF file written beside it.")] = "q8_0",
    system: Annotated[str, typer.Option("--system", help="A system prompt.")] = "",
    quiet: Quiet = False,
) -> None:
    """A Modelfile, and the GGUF file that it names, for `ollama create NAME -f Modelfile`."""
    from lexmill.inference.language_model import find_model
    from lexmill.model.directory import ModelDirectory
    from lexmill.runtimes.llama_cpp import export_gguf
    from lexmill.runtimes.ollama import require_decoder, write_modelfile

    path = find_model(model)
    require_decoder(ModelDirectory.open(path))
    file = out.parent / f"model-{type.lower()}.gguf"
    export_gguf(path, file, type, make_progress(quiet))
    write_modelfile(path, file, out, system)
    typer.echo(f"written to {out} and {file}\nNow: ollama create my-model -f {out}")
