"""`lexmill push`: upload a model to a hub."""

from __future__ import annotations

from typing import Annotated

import typer

from lexmill.cli.options import Model, Quiet, make_progress


def push(
    model: Model,
    repo: Annotated[str, typer.Argument(help="name or owner/name; made if it is not there.", metavar="REPO")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[
        str, typer.Option("--revision", help="The branch; made if it is not there.")
    ] = "main",
    message: Annotated[str, typer.Option("--message", help="Of the commit.", show_default=False)] = "",
    quiet: Quiet = False,
) -> None:
    """Upload a model to the Hugging Face hub, complete and with its model card, in one commit.

    Needs the extra: pip install "lexmill[hub]". Address and token are those of that client:
    HF_ENDPOINT and HF_TOKEN, or `hf auth login`.
    """
    from lexmill.inference.language_model import find_model
    from lexmill.runtimes.hub import push as upload

    address = upload(
        find_model(model),
        repo,
        private=private,
        revision=revision,
        message=message,
        progress=make_progress(quiet),
    )
    typer.echo(f"uploaded: {address}")
