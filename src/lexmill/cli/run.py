"""`lexmill run`: a whole recipe, or what is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli.options import (
    Json,
    Plan,
    PlanProcesses,
    Quiet,
    Set,
    begin_computing,
    console,
    make_progress,
    print_json,
)


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/quickstart.toml.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run directory [default: runs/NAME].")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Run again from this step.")
    ] = None,
    overrides: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would run, and why.")] = False,
    plan_only: Plan = False,
    processes: PlanProcesses = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: only the steps that must run; interrupted, the same command goes on."""
    from lexmill.devices import process_rank
    from lexmill.errors import ConfigError
    from lexmill.recipe import run as recipe_run
    from lexmill.recipe.config import read_recipe
    from lexmill.recipe.plan import make_plan

    read = read_recipe(recipe, tuple(overrides or ()))
    folder = recipe_run.run_directory(read, out)
    if start is not None and start not in read.steps:
        raise ConfigError(f"There is no step '{start}'.", f"Steps are {', '.join(read.steps)}.")
    if plan_only:
        _plan(read, folder, processes, json)
        return
    if dry_run:
        read.check()
        plan = make_plan(read, folder, start)
        if json:
            print_json([{"step": one.step, "done": not one.reason, "reason": one.reason} for one in plan])
        else:
            for one in plan:
                typer.echo(f"{one.step:<10} {one.reason or 'done'}")
        return
    plan = recipe_run.run(read, out, start=start, progress=make_progress(quiet))
    if process_rank():
        return  # the first process speaks for all
    if json:
        print_json(_records(folder))
        return
    _closing_table(folder, all(not one.reason for one in plan), read)


def _plan(recipe: Any, folder: Path, processes: int | None, json: bool) -> None:
    """What the training steps will cost."""
    from lexmill.cli.plan import planned_processes, show_plans
    from lexmill.recipe.costs import plan_costs

    world = planned_processes(processes)
    if world is not None:
        begin_computing()
        show_plans(plan_costs(recipe, folder, world), json)


def _records(folder: Path) -> dict[str, Any]:
    from lexmill.recipe.config import STEPS
    from lexmill.recipe.plan import read_record

    records = {step: read_record(folder, step) for step in STEPS}
    return {
        step: {"seconds": record.get("seconds"), "figures": record.get("figures", {})}
        for step, record in records.items()
    }


def _closing_table(folder: Path, nothing_to_do: bool, recipe: Any) -> None:
    from rich.table import Table

    screen = console()
    records = _records(folder)
    table = Table(title=f"{recipe.name}: from raw data to a running model", title_justify="left")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("what came of it", overflow="fold")
    for step in recipe.steps:
        text = str(folder / "report.html") if step == "report" else _said(step, records[step]["figures"])
        table.add_row(step, f"{records[step]['seconds'] or 0:.1f}", text)
    screen.print(table)
    _verify_table(folder, screen)
    if nothing_to_do:
        screen.print("All steps are done; nothing had to run.")
    screen.print()
    for said, command in _what_next(folder, recipe):
        screen.print(f"{said:<15} {command}")


# The figures of each step that the closing table shows, where the step has them.
_SHOWN = {
    "prepare": ("train text documents", "train chat documents"),
    "tokenizer": ("vocabulary", "bytes per token (held out)"),
    "pretrain": ("parameters", "tokens", "tokens per second"),
    "finetune": ("steps", "last loss"),
    "evaluate": (
        "text before bits_per_byte",
        "text after bits_per_byte",
        "replies after token_accuracy",
        "replies seen_after exact",
        "pretraining tokens loss",
        "pretraining tokens accuracy",
        "pretraining pairs accuracy",
    ),
    "export": ("f32 megabytes", "q8_0 megabytes"),
    "verify": ("equal", "of these up to ties", "different", "not checked"),
}


def _said(step: str, figures: dict[str, Any]) -> str:
    wanted = [key for key in _SHOWN.get(step, ()) if figures.get(key) is not None]
    wanted += [key for key in figures if key.startswith("fill ")]
    if step in ("rows", "base"):
        wanted = list(figures)
    wanted += [key for key in figures if key.startswith("task ")]
    parts = [
        f"{key.replace('_', ' ')}: {figures[key]}" if isinstance(figures[key], str)
        else f"{key.replace('_', ' ')} {figures[key]:,}"
        for key in wanted
    ]  # fmt: skip
    return ", ".join(parts)


def _what_next(folder: Path, recipe: Any) -> list[tuple[str, str]]:
    """Commands that fit the model."""
    if "base" in recipe.steps:
        return _what_next_of_task(folder, recipe)
    family = recipe.tables["pretrain"].get("model", {}).get("family", "llama")
    prompts = recipe.tables["pretrain"].get("prompts") or ["It is a truth"]
    found = []
    if "finetune" in recipe.steps:
        found.append(("Talk to it:", f"lexmill chat {folder}"))
    if family in ("bert", "modernbert", "t5"):
        found.append(("Let it fill:", f'lexmill fill {folder} "{prompts[0]}"'))
        found.append(("See it look:", f'lexmill explain attention {folder} "{prompts[0]}" --html look.html'))
    else:
        found.append(("Let it write:", f'lexmill generate {folder} "{prompts[0]}"'))
    if "report" in recipe.steps:
        found.append(("See its life:", str(folder / "report.html")))
    return found


def _what_next_of_task(folder: Path, recipe: Any) -> list[tuple[str, str]]:
    """The verb that uses what was learned."""
    verbs = {
        "chat": ("Talk to it:", f"lexmill chat {folder}"),
        "prefer": ("Talk to it:", f"lexmill chat {folder}"),
        "classify": ("Ask it:", f'lexmill classify {folder} "a text"'),
        "qa": ("Ask it:", f'lexmill answer {folder} "a question" --context file.txt'),
        "summarise": ("Let it write:", f"lexmill summarise {folder} --file text.txt"),
        "translate": ("Let it write:", f'lexmill translate {folder} "a text"'),
        "embed": ("Let it embed:", f'lexmill embed {folder} "a text"'),
    }
    found = [verbs[recipe.tables["finetune"].get("task", "chat")]] if "finetune" in recipe.steps else []
    if "report" in recipe.steps:
        found.append(("See its life:", str(folder / "report.html")))
    return found


def _verify_table(folder: Path, screen: Any) -> None:
    from lexmill.cli.verify import show_checks
    from lexmill.files import read_json

    path = folder / "verify.json"
    if path.is_file():
        show_checks(read_json(path), screen)
