"""`lexmill tokenizer`: train one, and see what it does."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli.options import Json, Out, Quiet, make_progress, print_json

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Train a tokenizer; encode, decode and inspect text."
)

Folder = Annotated[Path, typer.Argument(help="A model, run or tokenizer directory.", metavar="MODEL")]


def _load(path: Path):
    from lexmill.inference.language_model import find_model
    from lexmill.tokenizer.loading import FILE_NAMES
    from lexmill.tokenizer.tokenizer import Tokenizer

    for folder in (path, path / "tokenizer"):
        if any((folder / name).is_file() for name in FILE_NAMES):
            return Tokenizer.load(folder)
    return Tokenizer.load(find_model(path))


def _given(text: str | None) -> str:
    return text if text is not None else sys.stdin.read()


@app.command()
def train(
    documents: Annotated[Path, typer.Argument(help="The folder that 'lexmill prepare' wrote.")],
    out: Out,
    kind: Annotated[
        str,
        typer.Option(
            help="bpe for decoders, wordpiece for encoders, unigram for encoder-decoders, characters for experiments."
        ),
    ] = "bpe",
    vocab_size: Annotated[
        int, typer.Option(help="Everything counted: special tokens, bytes, pieces.")
    ] = 4096,
    lowercase: Annotated[
        bool, typer.Option("--lowercase", help="wordpiece: case and accents do not matter.")
    ] = False,
    sentinels: Annotated[
        int, typer.Option(help="unigram: how many <extra_id_0>, ... for span corruption.")
    ] = 100,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a tokenizer that transformers and llama.cpp apply identically."""
    from lexmill.config import from_mapping
    from lexmill.recipe.steps import document_texts
    from lexmill.tokenizer.training import TokenizerConfig, bytes_per_token, train_tokenizer

    config = from_mapping(
        TokenizerConfig,
        {"kind": kind, "vocab_size": vocab_size, "lowercase": lowercase, "sentinels": sentinels},
        "tokenizer",
    )
    progress = make_progress(quiet or json)
    tokenizer = train_tokenizer(document_texts(documents / "train.parquet"), config, progress)
    tokenizer.save(out)
    held_out = bytes_per_token(tokenizer, document_texts(documents / "validation.parquet"))
    if json:
        print_json(
            {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "bytes_per_token": held_out,
                "sha256": tokenizer.sha256,
            }
        )
    else:
        typer.echo(
            f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {held_out:.2f} bytes a token on held-out text, "
            f"written to {out}"
        )


@app.command()
def encode(
    model: Folder,
    text: Annotated[str | None, typer.Argument(help="The text; standard input when not given.")] = None,
    literal: Annotated[
        bool, typer.Option("--literal", help="Special tokens' texts are ordinary text.")
    ] = False,
    json: Json = False,
) -> None:
    """Text to token ids."""
    ids = _load(model).encode(_given(text), special=not literal)
    if json:
        print_json(ids)
    else:
        typer.echo(" ".join(map(str, ids)))


@app.command()
def decode(
    model: Folder,
    ids: Annotated[list[int] | None, typer.Argument(help="Token ids; standard input when not given.")] = None,
) -> None:
    """Token ids to text."""
    from lexmill.errors import DataError

    try:
        numbers = ids or [int(word) for word in sys.stdin.read().replace(",", " ").split()]
    except ValueError as error:
        raise DataError(
            f"Not a list of token ids: {error}.", "Give whole numbers, for example: 12 7 301"
        ) from error
    typer.echo(_load(model).decode(numbers))


@app.command()
def inspect(
    model: Folder,
    text: Annotated[str | None, typer.Argument(help="The text; standard input when not given.")] = None,
    json: Json = False,
) -> None:
    """Show each token of a text, its id and the characters that it stands for; then the special ids."""
    tokenizer = _load(model)
    text = _given(text)
    ids = tokenizer.encode(text)
    pieces = [tokenizer.token_bytes(token) for token in ids]
    shown = [
        piece.decode("utf-8", "backslashreplace") if piece is not None else tokenizer.token_text(token)
        for piece, token in zip(pieces, ids)
    ]
    special = {name: token for name, token in dataclasses.asdict(tokenizer.ids).items() if token is not None}
    if json:
        tokens = [{"id": token, "text": piece} for token, piece in zip(ids, shown)]
        print_json(
            {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "special": special, "tokens": tokens}
        )
        return
    for token, piece in zip(ids, shown):
        typer.echo(f"{token:>7}  {piece!r}")
    size = len(text.encode("utf-8"))
    typer.echo(f"{len(ids):,} tokens, {size:,} bytes, {size / max(len(ids), 1):.2f} bytes a token")
    sentinels = special.pop("sentinels")
    listed = [f"{name} {token}" for name, token in special.items() if name not in ("stop", "add_bos")]
    if sentinels:
        listed.append(f"{len(sentinels)} sentinels from {sentinels[0]} to {sentinels[-1]}")
    typer.echo(
        f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens; {', '.join(listed) or 'no special tokens'}"
    )
