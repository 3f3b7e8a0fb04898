"""`lexmill run`: a whole recipe, or what is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli.options import Json, Quiet, Set, console, make_progress, print_json


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
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: only the steps that must run; interrupted, the same command goes on."""
    from lexmill.errors import ConfigError
    from lexmill.recipe import run as recipe_run
    from lexmill.recipe.config import STEPS, read_recipe
    from lexmill.recipe.plan import make_plan

    read = read_recipe(recipe, tuple(overrides or ()))
    folder = recipe_run.run_directory(read, out)
    if start is not None and start not in STEPS:
        raise ConfigError(f"There is no step '{start}'.", f"Steps are {', '.join(STEPS)}.")
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
    if json:
        print_json(_records(folder))
        return
    _closing_table(folder, all(not one.reason for one in plan), read.name)


def _records(folder: Path) -> dict[str, Any]:
    from lexmill.recipe.config import STEPS
    from lexmill.recipe.plan import read_record

    records = {step: read_record(folder, step) for step in STEPS}
    return {
        step: {"seconds": record.get("seconds"), "figures": record.get("figures", {})}
        for step, record in records.items()
    }


def _closing_table(folder: Path, nothing_to_do: bool, name: str) -> None:
    from rich.table import Table

    screen = console()
    records = _records(folder)
    figures = {step: record["figures"] for step, record in records.items()}

    def said(step: str, *wanted: str) -> str:
        parts = []
        for key in wanted:
            value = figures[step].get(key)
            if value is not None:
                parts.append(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}")
        return ", ".join(parts)

    table = Table(title=f"{name}: from raw text to a running model", title_justify="left")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("what came of it", overflow="fold")
    rows = {
        "prepare": said("prepare", "train text documents", "train chat documents"),
        "tokenizer": said("tokenizer", "vocabulary", "bytes per token (held out)"),
        "pretrain": said("pretrain", "parameters", "tokens", "tokens per second"),
        "finetune": said("finetune", "steps", "last loss"),
        "evaluate": said(
            "evaluate",
            "text before bits_per_byte",
            "replies after token_accuracy",
            "replies seen_after exact",
        ).replace("_", " "),
        "export": said("export", "f32 megabytes", "q8_0 megabytes"),
        "verify": said("verify", "equal", "of these up to ties", "different", "not checked"),
        "report": str(folder / "report.html"),
    }
    for step, text in rows.items():
        table.add_row(step, f"{records[step]['seconds'] or 0:.1f}", text)
    screen.print(table)
    _verify_table(folder, screen)
    if nothing_to_do:
        screen.print("All steps are done; nothing had to run.")
    screen.print(f"\nTalk to it:     lexmill chat {folder}")
    screen.print(f'Let it write:   lexmill generate {folder} "It is a truth"')
    screen.print(f"See its life:   {folder / 'report.html'}")


def _verify_table(folder: Path, screen: Any) -> None:
    from lexmill.cli.verify import show_checks
    from lexmill.files import read_json

    path = folder / "verify.json"
    if path.is_file():
        show_checks(read_json(path)["checks"], screen)
