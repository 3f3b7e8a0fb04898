"""`lexmill data check`: what is wrong with a file of rows, and what a model will see of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lexmill.cli.options import Form, Json, Quiet, Set, console, make_progress, print_json

if TYPE_CHECKING:
    from lexmill.data.check import FileReport, Overlap
    from lexmill.finetune.check import LengthReport, Piece, Sketch

app = typer.Typer(help="Look at labelled rows before they are learned.", no_args_is_help=True)

_BAR = 30  # letters
_EXAMPLE = 2000  # characters of a text that is shown


@app.callback()
def _data() -> None:
    """Look at labelled rows before they are learned."""


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="A file of rows, or two text files as 'train.{en,de}'.")],
    task: Annotated[
        str,
        typer.Option(
            "--task", help="chat, classify, embed, prefer, qa, summarise or translate.", show_default=False
        ),
    ] = "",
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", help="Count tokens as this model does, and show what it will see.", show_default=False
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            help="The training rows, of which FILE should hold none; else what FILE would hold out is compared.",
            show_default=False,
        ),
    ] = None,
    form: Form = None,
    examples: Annotated[
        int, typer.Option("--examples", min=0, help="Rows shown as the model sees them.")
    ] = 3,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Bad rows, repeated rows and so on that are named.")
    ] = 10,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a whole file of rows and report bad rows, lengths, repeated rows, leaks between splits, labels, examples.

    Settings are those of 'lexmill finetune': --set columns.text=review --set row_length=512
    Exit code 0: every row can be used. 1: there are bad rows. 2: the file cannot be read.
    """
    from lexmill.config import apply_overrides, from_mapping, suggest
    from lexmill.data.check import check_rows
    from lexmill.data.labelled import KINDS_OF_TASKS
    from lexmill.data.tables import count_rows
    from lexmill.errors import ConfigError
    from lexmill.finetune.check import Lengths, sketcher
    from lexmill.finetune.config import FinetuneConfig
    from lexmill.inference.language_model import find_model
    from lexmill.model.directory import ModelDirectory

    if task and task not in KINDS_OF_TASKS:
        raise ConfigError(f"There is no task '{task}'.", suggest(task, KINDS_OF_TASKS))
    if model is not None and not task:
        raise ConfigError("What a model sees depends on the task.", "Say it with --task.")
    table = {"steps": 1, **({"task": task} if task else {}), **({"form": form} if form else {})}
    config = from_mapping(FinetuneConfig, apply_overrides(table, overrides or ()), "finetune")
    opened = ModelDirectory.open(find_model(model)) if model is not None else None
    lengths = Lengths(task, opened, config, show) if opened is not None else None
    first: list[Any] = []

    def see(row: Any) -> None:
        if len(first) < examples:
            first.append(row)
        if lengths:
            lengths.see(row)

    report = check_rows(
        file,
        config,
        KINDS_OF_TASKS[task] if task else None,
        against=against,
        fraction=config.validation_fraction,
        seed=config.seed,
        shown=show,
        see=see,
        total=count_rows(file),
        progress=make_progress(quiet or json),
    )
    measured = lengths.report() if lengths else None
    shown: list[tuple[str, Sketch]] = []
    if opened is not None:
        sketch = sketcher(task, opened, config)
        shown = [(row.origin, sketch(row)) for row in first]
    if json:
        print_json(
            report.as_json()
            | ({"lengths": vars(measured)} if measured else {})
            | ({"examples": [_plain(origin, one) for origin, one in shown]} if shown else {})
        )
    else:
        _show(report, measured, str(model), shown)
    raise typer.Exit(1 if report.bad or (measured and measured.unfit) else 0)


def _show(
    report: FileReport, measured: LengthReport | None, model: str, shown: list[tuple[str, Sketch]]
) -> None:
    """All of it, for a reader."""
    screen = console()
    _show_file(report, screen)
    if measured:
        _show_lengths(measured, model, screen)
    _show_overlap("repeated rows", report, report.duplicates, screen)
    if report.compared:
        _show_overlap(f"leakage between {report.compared}", report, report.leakage, screen)
    if report.labels:
        _show_labels(report, screen)
    for origin, one in shown:
        _show_example(origin, one, screen)
    if shown:
        screen.print("\nTargets are green; in a pipe they stand between ⟦ and ⟧.", style="dim")


def _plain(origin: str, sketch: Sketch) -> dict[str, Any]:
    """An example for scripts."""
    parts = [
        {"name": name, "pieces": [{"text": text, "target": target} for text, target in pieces]}
        for name, pieces in sketch.parts()
    ]
    return {"origin": origin, "parts": parts}


def _title(text: str, screen: Any) -> None:
    from rich.text import Text

    screen.print(Text(f"\n{text}", "bold"))


def _show_file(report: FileReport, screen: Any) -> None:
    from rich.text import Text

    good = f"{report.rows:,} rows that can be used"
    line = Text(f"{report.path}: ") + Text(f"form '{report.form}'", "bold") + Text(f", {good}, ")
    screen.print(line + Text(f"{report.bad:,} bad", "bold red" if report.bad else "green"))
    others = {name: count for name, count in report.forms.items() if name != report.form}
    if others:
        told = ", ".join(
            f"{count:,} like '{name}'" if name else f"{count:,} like none" for name, count in others.items()
        )
        screen.print(Text(f"  rows that do not look like '{report.form}': {told}", "red"))
    if report.dropped:
        told = ", ".join(f"{name} ({count:,})" for name, count in report.dropped.items())
        screen.print(Text(f"  not used: {told}", "dim"))
    if report.errors:
        _title("bad rows", screen)
        for error in report.errors:
            _print_indented(Text(error.replace(f"{report.path}, ", "", 1)), screen)
        _show_rest(report.bad - len(report.errors), screen)


def _print_indented(text: Any, screen: Any, by: int = 2) -> None:
    """Print with a margin, lines folded inside it; in a pipe they stay whole."""
    from rich.padding import Padding
    from rich.text import Text

    if screen.is_terminal:
        screen.print(Padding(text, (0, 0, 0, by)))
    else:
        screen.print(Text("\n").join(Text(" " * by) + line for line in text.split("\n", allow_blank=True)))


def _show_rest(count: int, screen: Any) -> None:
    if count > 0:
        screen.print(f"  … and {count:,} more (--show N)", style="dim")


def _show_lengths(report: LengthReport, model: str, screen: Any) -> None:
    from rich.text import Text

    _title(f"tokens of a row, by {model}", screen)
    for name, figures in (("", report.tokens), ("written: ", report.written)):
        if figures:
            told = ", ".join(
                f"{key} up to {value:,.0f}" if "%" in key else f"{key} {value:,.0f}"
                for key, value in figures.items()
            )
            screen.print(f"  {name}{told}; targets {100 * report.targets:.0f} %")
    most = max((count for _, _, count in report.histogram), default=0)
    wide = len(f"{report.histogram[-1][1]:,}") if report.histogram else 0
    for low, high, count in report.histogram:
        over = "red" if low > report.limit else "cyan"
        screen.print(
            Text(f"  {low:>{wide},} – {high:>{wide},} ") + _bar(count, most, over) + Text(f" {count:,}")
        )
    if report.too_long:
        screen.print(
            Text(
                f"  {report.too_long:,} rows are longer than a row of training ({report.limit:,} tokens: row_length); "
                f"{report.without_targets:,} would lose all targets",
                "yellow",
            )
        )
        for origin, size in report.shown:
            screen.print(f"    {origin.split(', ')[-1]}: {size:,} tokens")
        _show_rest(report.too_long - len(report.shown), screen)
    else:
        screen.print(f"  all fit a row of training ({report.limit:,} tokens)", style="green")
    if report.unfit:
        screen.print(Text(f"  {report.unfit:,} rows cannot be written for this model:", "red"))
        for error in report.unfit_shown:
            _print_indented(Text(error), screen, 4)


def _bar(count: int, most: int, style: str) -> Any:
    from rich.text import Text

    size = max(round(_BAR * count / most), 1 if count else 0) if most else 0
    return Text("█" * size, style)


def _show_overlap(title: str, report: FileReport, found: Overlap, screen: Any) -> None:
    from rich.text import Text

    words = {
        "exact": "the same",
        "near": "but for case, punctuation or spaces",
        "prompt": "ask the same with another answer",
        "context": "share a context",
    }
    _title(title, screen)
    parts = [f"{getattr(found, how):,} {said}" for how, said in words.items() if getattr(found, how)]
    screen.print(Text(f"  {'; '.join(parts) or 'none'}", "yellow" if found.rows else ""))
    for origin, other, how in found.shown:
        here, there = (one.removeprefix(f"{report.path}, ") for one in (origin, other))
        screen.print(Text(f"    {here} = {there}" + (f", {words[how]}" if how != "exact" else "")))
    _show_rest(found.rows + found.prompt - len(found.shown), screen)


def _show_labels(report: FileReport, screen: Any) -> None:
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    _title(f"{len(report.labels):,} labels", screen)
    most, total = max(report.labels.values()), sum(report.labels.values())
    wide = max(cell_len(name) for name in list(report.labels)[:30])
    for name, count in list(report.labels.items())[:30]:
        share = f" {count:,} ({100 * count / total:.1f} %)"
        screen.print(Text(f"  {set_cell_size(name, wide)} ") + _bar(count, most, "cyan") + Text(share))
    if report.contradictions:
        screen.print(Text(f"  {report.contradictions:,} texts occur with different labels", "yellow"))


def _show_example(origin: str, sketch: Sketch, screen: Any) -> None:
    from rich.text import Text

    _title(origin, screen)
    for name, pieces in sketch.parts():
        text = Text.assemble((f"{name}: " if name else "", "bold cyan"))
        for piece in pieces:
            text += _piece(piece, screen.is_terminal)
        _print_indented(text, screen)


def _piece(piece: Piece, colours: bool) -> Any:
    from rich.text import Text

    text, target = piece
    if len(text) > _EXAMPLE:
        text = f"{text[: _EXAMPLE // 2]} … {text[-_EXAMPLE // 2 :]}"
    if colours:
        return Text(text, "black on green" if target else "")
    return Text(f"⟦{text}⟧" if target else text)
