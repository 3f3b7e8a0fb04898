"""`lexmill pretrain`: a model from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli.options import (
    Json,
    OutOrNone,
    Plan,
    PlanProcesses,
    Quiet,
    Set,
    begin_computing,
    make_progress,
    print_json,
)


def pretrain(
    documents: Annotated[
        Path | None, typer.Argument(help="The folder that 'lexmill prepare' wrote.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="The folder that 'lexmill tokenizer train' wrote.")
    ] = None,
    out: OutOrNone = None,
    steps: Annotated[int | None, typer.Option(help="Budget in steps.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget in tokens.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes.")] = None,
    overrides: Set = None,
    plan: Plan = False,
    processes: PlanProcesses = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model from nothing. Interrupted, the same command goes on.

    Every setting of a recipe's [pretrain] table can be given: --set model.width=256 --set rows=16

    With --plan nothing is written, and neither documents nor a tokenizer are needed: --set vocab_size=8000
    """
    begin_computing()
    from lexmill.config import apply_overrides, from_mapping
    from lexmill.devices import process_rank
    from lexmill.errors import ConfigError
    from lexmill.pretrain.stage import PretrainConfig
    from lexmill.pretrain.stage import pretrain as run_pretrain
    from lexmill.recipe.steps import continue_text
    from lexmill.tokenizer.tokenizer import Tokenizer

    given = {"steps": steps, "tokens": tokens, "minutes": minutes}
    table = {name: value for name, value in given.items() if value is not None}
    table = apply_overrides(table, overrides or ())
    if plan:
        _plan(table, documents, tokenizer, out, processes, json)
        return
    if documents is None or tokenizer is None or out is None:
        raise ConfigError(
            "Pretraining needs DOCUMENTS, --tokenizer and --out.",
            "Or give --plan, to see what a run will cost.",
        )
    config = from_mapping(PretrainConfig, table, "pretrain")
    directory, result = run_pretrain(
        config,
        documents,
        Tokenizer.load(tokenizer),
        out,
        sample=continue_text,
        progress=make_progress(quiet or json),
    )
    if process_rank():
        return  # the first process speaks for all
    if json:
        print_json({**vars(result), "model": str(directory.path)})
    else:
        typer.echo(
            f"{result.steps:,} steps, {result.tokens:,} tokens, {result.seconds:.0f} s; model in {directory.path}"
        )


def _plan(
    table: dict[str, Any],
    documents: Path | None,
    tokenizer: Path | None,
    out: Path | None,
    processes: int | None,
    json: bool,
) -> None:
    from lexmill.cli.plan import planned_processes, show_plans
    from lexmill.config import from_mapping
    from lexmill.errors import ConfigError
    from lexmill.pretrain.plan import plan_pretraining
    from lexmill.pretrain.stage import PretrainConfig
    from lexmill.tokenizer.tokenizer import Tokenizer

    world = planned_processes(processes)
    if world is None:
        return
    size = table.pop("vocab_size", None)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ConfigError(f"vocab_size should be a positive number, not {size!r}.")
    forecast = plan_pretraining(
        from_mapping(PretrainConfig, table, "pretrain"),
        vocab_size=size,
        documents=documents,
        tokenizer=Tokenizer.load(tokenizer) if tokenizer else None,
        out=out,
        world=world,
    )
    show_plans({"pretrain": forecast}, json)
