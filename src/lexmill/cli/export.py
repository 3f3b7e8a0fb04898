"""`lexmill export`: a model for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Model, Out, Quiet, make_progress

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Write a model for Hugging Face, llama.cpp or Ollama."
)

_TYPES = (
    "f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0; which tensor gets "
    "which type is llama.cpp's choice."
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
    type: Annotated[
        str,
        typer.Option(
            "--type", help=_TYPES + " Of an adapter: f32, f16, bf16.", show_default="f16; adapters f32"
        ),
    ] = "",
    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", help="An importance matrix, made by lexmill imatrix.", show_default=False),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """A GGUF file for llama.cpp; of an adapter directory an adapter file, for its --lora."""
    from lexmill.inference.language_model import find_model
    from lexmill.model.adapter_files import is_adapter
    from lexmill.runtimes.gguf_adapter import export_adapter_gguf
    from lexmill.runtimes.llama_cpp import export_gguf

    if is_adapter(model):
        export_adapter_gguf(model, out, type or "f32")
    else:
        export_gguf(find_model(model), out, type or "f16", make_progress(quiet), imatrix)
    typer.echo(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB)")


@app.command()
def ollama(
    model: Model,
    name: Annotated[str, typer.Option("--name", help="Its name in Ollama: my-model or my-model:tag.")] = "",
    store: Annotated[
        Path | None, typer.Option("--store", help="Install it in this store; no server needs to run.")
    ] = None,
    url: Annotated[str, typer.Option("--url", help="Have the server at this address install it.")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write a Modelfile.")] = None,
    type: Annotated[str, typer.Option("--type", help="Type of the GGUF file.")] = "q8_0",
    gguf: Annotated[
        Path | None, typer.Option("--gguf", help="Take this GGUF file of the model instead of making one.")
    ] = None,
    system: Annotated[str, typer.Option("--system", help="A system prompt.")] = "",
    template: Annotated[
        bool,
        typer.Option(
            "--template/--no-template", help="Without: Ollama 0.30 reads the template in the GGUF file."
        ),
    ] = True,
    quiet: Quiet = False,
) -> None:
    """A model for Ollama: a Modelfile with its GGUF file, or installed, in a store or by a running server.

    With --name alone it is installed in Ollama's own store: OLLAMA_MODELS, or ~/.ollama/models.
    """
    import tempfile

    from lexmill.errors import ConfigError
    from lexmill.inference.language_model import find_model
    from lexmill.model.adapter_files import AdapterDirectory, is_adapter
    from lexmill.model.directory import ModelDirectory
    from lexmill.runtimes.gguf_adapter import export_adapter_gguf
    from lexmill.runtimes.llama_cpp import export_gguf
    from lexmill.runtimes.ollama import ADAPTERS_UNTIL, create, describe, install, write_modelfile
    from lexmill.runtimes.ollama_api import OllamaServer
    from lexmill.runtimes.ollama_names import ModelName
    from lexmill.runtimes.ollama_store import Store, default_store

    if not name and (store or url or not out):
        raise ConfigError(
            "A model in Ollama has a name.", "Give one with --name, or --out for a Modelfile alone."
        )
    if not template and (url or out):
        raise ConfigError(
            "Without a template 'ollama create' adds one that it guesses.", "Use --no-template with --store."
        )
    found = AdapterDirectory.open(model) if is_adapter(model) else None
    directory = found.base if found else ModelDirectory.open(find_model(model))
    called, progress = ModelName.parse(name) if name else None, make_progress(quiet)
    describe(directory, system, template)  # what cannot be is said before anything is written
    if found:
        typer.echo(ADAPTERS_UNTIL)
    if out:
        gguf = gguf or export_gguf(directory, out.parent / f"model-{type.lower()}.gguf", type, progress)
        adapter = export_adapter_gguf(found, out.parent / "adapter.gguf") if found else None
        write_modelfile(directory, gguf, out, system, adapter)
        typer.echo(f"written to {out}, for {gguf}" + (f" and {adapter}" if adapter else ""))
        typer.echo(f"Now: ollama create {called or 'my-model'} -f {out}")
    with tempfile.TemporaryDirectory() as folder:
        extra = export_adapter_gguf(found, Path(folder) / "adapter.gguf") if found and called else None
        if called and url:
            server = OllamaServer(url)
            file = gguf or export_gguf(directory, Path(folder) / f"model-{type.lower()}.gguf", type, progress)
            create(directory, called, server, file, system=system, adapter=extra, progress=progress)
            typer.echo(f"created {called} at {server.address}")
        if not called or not (store or not (url or out)):
            return
        place = Store(store or default_store())
        called = install(
            directory,
            called,
            place,
            gguf=gguf,
            type=type,
            system=system,
            template=template,
            adapter=extra,
            progress=progress,
        )
        typer.echo(f"installed {called} in {place.root}")
        if store is not None and place.root.resolve() != Store(default_store()).root.resolve():
            typer.echo(f"A server that looks there: OLLAMA_MODELS={place.root} ollama serve")
        typer.echo(f"Now: ollama run {called}")
