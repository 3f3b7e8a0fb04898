"""`lexmill evaluate`: how good is a model, on text or at a task?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli.options import (
    AnyModel,
    Form,
    Json,
    Quiet,
    Set,
    begin_computing,
    console,
    make_progress,
    print_json,
)


def evaluate(
    model: AnyModel,
    documents: Annotated[
        Path | None, typer.Argument(help="The folder that 'lexmill prepare' wrote.", show_default=False)
    ] = None,
    base: Annotated[Path | None, typer.Option("--base", help="Another model to compare with.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="Score this task on the rows of --data: chat, classify, embed, prefer, qa, summarise, translate.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="A file of rows, all of which are scored.", show_default=False),
    ] = None,
    form: Form = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="auto, native (lexmill's own engine), torch; in a task that writes, llama_cpp and transformers too.",
        ),
    ] = "auto",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows at most.")] = None,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Above 1: beam search.")] = 1,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of what is written.")] = 256,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions", help="Write what the model gave for each row here (JSONL).", show_default=False
        ),
    ] = None,
    language: Annotated[
        str, typer.Option("--language", help="Of answers: en is scored as SQuAD, zh as CMRC 2018.")
    ] = "auto",
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Loss, perplexity and bits per byte on held-out text; or with --task the task's own scores on a file of rows."""
    begin_computing()
    from lexmill.errors import ConfigError

    if (documents is None) == (task is None or data is None):
        raise ConfigError(
            "Give either a folder that 'lexmill prepare' wrote, or --task and --data.",
            "lexmill evaluate MODEL --task chat --data rows.jsonl",
        )
    if documents is not None:
        _on_documents(model, documents, base, backend, json, quiet)
        return
    from lexmill.cli.backends import open_for_scoring
    from lexmill.config import apply_overrides, from_mapping
    from lexmill.evaluate.scores import ScoreConfig
    from lexmill.evaluate.task import score_task
    from lexmill.files import write_jsonl

    assert task is not None and data is not None
    table = {"limit": limit, "beams": beams, "max_tokens": max_tokens, "language": language, "form": form}
    config = from_mapping(ScoreConfig, apply_overrides(table, overrides or ()), "evaluate")
    named = {"model": model} | ({"base": base} if base else {})
    progress = make_progress(quiet or json)
    found = {}
    for name, path in named.items():
        opened, writer = open_for_scoring(path, backend)
        found[name] = score_task(task, opened, data, config, progress, writer)
    if predictions is not None:
        write_jsonl(predictions, ({"prediction": one} for one in found["model"].predictions))
    if json:
        compared = {"base": found["base"].as_json()} if base else {}
        print_json(found["model"].as_json() | compared)
        return
    for name, scores in found.items():
        told = ", ".join(f"{metric.replace('_', ' ')} {value:,}" for metric, value in scores.metrics.items())
        typer.echo(f"{task}, {scores.rows:,} rows, {name}: {told}")
    details = found["model"].details
    for key, value in details.items():
        if key not in ("labels", "confusion"):
            typer.echo(f"  {key.replace('_', ' ')}: {_in_words(value)}")
    if "confusion" in details:
        _show_confusion(details["labels"], details["confusion"])


def _in_words(value: Any) -> str:
    """A detail on one line: figures with their names."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {figure}" for name, figure in value.items())
    return " ".join(str(value).split())


def _show_confusion(labels: list[str], matrix: list[list[int]]) -> None:
    """Who is taken for whom: a row is what is right, a column what was given."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("right, and given:", style="bold")
    for label in labels:
        table.add_column(Text(label), justify="right")
    for index, (label, row) in enumerate(zip(labels, matrix)):
        cells = [Text(str(count or "·"), style="bold" if at == index else "") for at, count in enumerate(row)]
        table.add_row(Text(label), *cells)
    console().print(table)


def _on_documents(
    model: Path, documents: Path, base: Path | None, backend: str, json: bool, quiet: bool
) -> None:
    from lexmill.evaluate.stage import EvaluateConfig
    from lexmill.evaluate.stage import evaluate as run_evaluate
    from lexmill.inference.language_model import load

    scores = run_evaluate(
        EvaluateConfig(),
        load(model, backend=backend),
        documents,
        base=load(base, backend=backend) if base else None,
        progress=make_progress(quiet or json),
    )
    if json:
        print_json(scores)
        return
    for part in ("text", "replies"):
        for name, figures in scores.get(part, {}).items():
            which = {"before": "base", "after": "model", "seen_after": "model, questions seen in training"}[
                name
            ]
            told = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in figures.items())
            typer.echo(f"{part}, {which}: {told}")
