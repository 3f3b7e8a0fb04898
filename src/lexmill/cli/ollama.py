"""`lexmill ollama`: the models in an Ollama store, looked at and removed without a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Json, Quiet, console, make_progress, print_json

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at the models in an Ollama store, and remove them. To install one: lexmill export ollama.",
)

StoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--store", help="The store [default: OLLAMA_MODELS, or ~/.ollama/models].", show_default=False
    ),
]
Name = Annotated[
    str, typer.Argument(help="A model's name, as in Ollama: my-model or my-model:tag.", metavar="NAME")
]


@app.command("list")
def list_(store: StoreFolder = None, json: Json = False) -> None:
    """Every model in the store."""
    from dataclasses import asdict

    from rich.table import Table
    from rich.text import Text

    from lexmill.runtimes.ollama_show import list_models
    from lexmill.runtimes.ollama_store import Store, default_store

    place = Store(store or default_store())
    rows = list_models(place)
    if json:
        print_json([asdict(row) for row in rows])
        return
    if not rows:
        typer.echo(f"no models in {place.root}")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("name", "weights", "type", "size", "modified", ""):
        table.add_column(title)
    for row in rows:
        cells = [
            row.name,
            row.parameters,
            row.quantisation,
            f"{row.bytes / 1e6:,.1f} MB",
            row.modified,
            row.problem,
        ]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console().print(table)


@app.command()
def show(
    name: Name,
    store: StoreFolder = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read every blob and compare it with its hash.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a model is: architecture, size, template, parameters, licences.

    Exit code 2 when a blob is missing, has another size or, with --check, another hash.
    """
    from lexmill.runtimes.ollama_names import ModelName
    from lexmill.runtimes.ollama_show import show_model
    from lexmill.runtimes.ollama_store import Store, default_store

    place = Store(store or default_store())
    details = show_model(place, ModelName.parse(name), hashes=check, progress=make_progress(quiet or json))
    if json:
        print_json(details.to_json())
    else:
        facts = {
            "name": details.name,
            "architecture": details.architecture,
            "weights": details.parameters,
            "type": details.quantisation,
            "capability": details.capability,
            "context": details.context,
            "width": details.width,
            "size": f"{details.bytes / 1e6:,.1f} MB",
            "modified": details.modified,
        }
        for key, value in facts.items():
            if value not in (None, ""):
                typer.echo(f"{key:<13} {printable(str(value))}")
        typer.echo("\n" + printable(details.modelfile()), nl=False)
    for problem in details.problems:
        typer.echo(f"problem: {printable(problem)}", err=True)
    if details.problems:
        raise typer.Exit(2)


@app.command()
def rm(name: Name, store: StoreFolder = None) -> None:
    """Remove a model, and the blobs that no other model uses."""
    from lexmill.runtimes.ollama_names import ModelName
    from lexmill.runtimes.ollama_store import Store, default_store

    place = Store(store or default_store())
    done = place.remove(ModelName.parse(name))
    typer.echo(f"removed {name}: {done.blobs} blobs, {done.bytes / 1e6:,.1f} MB")
    if done.kept:
        typer.echo(f"Its blobs were left: {printable(done.kept)}", err=True)


def printable(text: str) -> str:
    """`text` without what could command a terminal: a store's texts may come from anyone."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else f"\\u{ord(character):04x}"
        for character in text
    )
