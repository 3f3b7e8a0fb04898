"""`lexmill finetune`: teach a model a task, all of it or by an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli.options import (
    Form,
    Json,
    Model,
    OutOrNone,
    Plan,
    PlanProcesses,
    Quiet,
    Set,
    begin_computing,
    make_progress,
    print_json,
)

_SHOWN, _WIDTH = 3, 160  # examples, and characters of each


def finetune(
    model: Model,
    task: Annotated[
        str,
        typer.Option(
            "--task", help="What to learn: chat, classify, embed, prefer, qa, summarise, translate."
        ),
    ] = "chat",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="A file of rows (JSONL, JSON, CSV, TSV, Parquet), or the folder that 'lexmill prepare' wrote.",
            show_default=False,
        ),
    ] = None,
    out: OutOrNone = None,
    form: Form = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            "--validation", help="A file of rows to measure on; else a part of --data.", show_default=False
        ),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train an adapter; the model stays as it is.")] = False,
    steps: Annotated[int | None, typer.Option(help="Budget in steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes.")] = None,
    score: Annotated[
        bool,
        typer.Option("--score/--no-score", help="Score validation rows before and after."),
    ] = True,
    overrides: Set = None,
    plan: Plan = False,
    processes: PlanProcesses = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on a task. Interrupted, the same command goes on.

    For chat each row has "messages", and the loss is on the replies only. Every setting of a recipe's
    [finetune] table can be given: --set rows=8 --set lora.rank=32 --set lora.quantise=q4_1
    Columns of other names: --set columns.text=review
    """
    begin_computing()
    from lexmill.config import apply_overrides, from_mapping
    from lexmill.devices import process_rank
    from lexmill.errors import ConfigError
    from lexmill.finetune.stage import FinetuneConfig
    from lexmill.inference.language_model import find_model
    from lexmill.model.directory import ModelDirectory
    from lexmill.recipe.steps import answer_question
    from lexmill.recipe.tuned import finetune_and_score

    table: dict[str, Any] = {"steps": steps, "minutes": minutes, "form": form, "score": score}
    table = {name: value for name, value in table.items() if value is not None}
    table = apply_overrides({"task": task, **table, **({"lora": {}} if lora else {})}, overrides or ())
    config = from_mapping(FinetuneConfig, table, "finetune")
    base = ModelDirectory.open(find_model(model))
    if plan:
        _plan(config, base, data, validation, processes, json)
        return
    if data is None or out is None:
        raise ConfigError(
            "Fine-tuning needs --data and --out.", "Or give --plan, to see what a run will cost."
        )
    made, result, scores = finetune_and_score(
        config,
        base,
        data,
        out,
        validation=validation,
        reply=answer_question,
        progress=make_progress(quiet or json),
    )
    if process_rank():
        return  # the first process speaks for all
    kind = "adapter" if config.lora else "model"
    if json:
        print_json({**vars(result), kind: str(made.path)} | ({"scores": scores} if scores else {}))
        return
    if scores:
        _show_scores(scores, quiet)
    typer.echo(f"{result.steps:,} steps, {result.seconds:.0f} s; {kind} in {made.path}")


def _show_scores(scores: dict[str, Any], quiet: bool) -> None:
    """A line a figure, before and after, and some of what was written."""
    for part, sides in scores.items():
        if part in ("rows", "details", "examples"):
            continue
        before, after = sides.get("before", {}), sides.get("after", {})
        for name, value in (after or before).items():
            if name == "targets":
                continue
            earlier = f"{before[name]:>10,.4f}  ->" if name in before else " " * 14
            typer.echo(f"{part + ' ' + name.replace('_', ' '):<32} {earlier} {value:>10,.4f}")
    for example in [] if quiet else scores.get("examples", [])[:_SHOWN]:
        typer.echo("")
        for name in ("question", "expected", "before", "after"):
            if name in example:
                typer.echo(f"  {name:<9} {' '.join(example[name].split())[:_WIDTH]}")


def _plan(
    config: Any, base: Any, data: Path | None, validation: Path | None, processes: int | None, json: bool
) -> None:
    from lexmill.cli.plan import planned_processes, show_plans
    from lexmill.finetune.plan import plan_finetuning

    world = planned_processes(processes)
    if world is not None:
        forecast = plan_finetuning(
            config,
            base.config,
            data=data,
            validation=validation,
            tokenizer=base.tokenizer if data else None,
            world=world,
        )
        show_plans({"finetune": forecast}, json)
