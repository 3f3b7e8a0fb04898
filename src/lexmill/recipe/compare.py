"""Several runs on one page: curves over one another, their figures, and the settings in which they differ.

Like the report of one run it needs no other file, and shows only what runs left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lexmill import page
from lexmill.files import atomic_write
from lexmill.recipe import markup
from lexmill.recipe.compare_charts import AXES, chart_title, charted, comparison_charts, described_marks
from lexmill.recipe.compare_data import STAGES, ComparedRun, comparison, differences

COLOURS = 6  # of compare.css; runs after these have dashed lines, then dotted ones
_LONGEST_TITLE = 70
_LONGEST_SETTING = 160


def write_comparison(runs: Sequence[ComparedRun], out: Path) -> Path:
    """Write the comparison of runs as one HTML file.

    Args:
        runs: from `read_runs`.
        out: the HTML file to write; it appears whole or not at all.

    Returns:
        `out`.

    Raises:
        FileError: `out` cannot be written.
    """
    text = _page(runs)
    with atomic_write(out, "wb") as file:
        file.write(text.encode("utf-8", "replace"))  # a half of a surrogate pair becomes "?"
    return Path(out)


def _page(runs: Sequence[ComparedRun]) -> str:
    rows = comparison(runs)["runs"]
    stages = [stage for stage in STAGES if any(stage in run.trainings for run in runs)]
    sections = [
        *(_runs_table(stage, [row for row in rows if row["stage"] == stage], runs) for stage in stages),
        _differences(runs),
        _controls(runs),
        *(_curves(stage, runs) for stage in stages),
    ]
    assets = {name: page.asset("lexmill.recipe", name) for name in _ASSETS}
    body = "\n".join(sections)
    return page.page(
        title=f"{_title(runs)}: comparison of lexmill runs",
        styles=[assets["report.css"], assets["uPlot.min.css"], assets["compare.css"]],
        body=f"""<header><p class="eyebrow">Comparison of lexmill runs</p><h1>{markup.escaped(_title(runs))}</h1>
{_lead(rows)}</header>
<main>
{body}
</main>
<footer>Written by lexmill from the metrics of the runs. This page loads nothing from the network.</footer>""",
        data=("comparison", comparison_charts(runs)),
        scripts=[f"/*\n{assets['uPlot.LICENSE']}\n*/\n{assets['uPlot.iife.min.js']}", assets["compare.js"]],
    )


_ASSETS = ("report.css", "uPlot.min.css", "compare.css", "uPlot.LICENSE", "uPlot.iife.min.js", "compare.js")


def _title(runs: Sequence[ComparedRun]) -> str:
    names = [run.name for run in runs]
    said = f"{', '.join(names[:-1])} and {names[-1]}"
    return said if len(said) <= _LONGEST_TITLE else f"{len(runs)} runs"


def _lead(rows: Sequence[Mapping[str, Any]]) -> str:
    said = []
    for stage, title in STAGES.items():
        known = [row for row in rows if row["stage"] == stage and row["best_validation_loss"] is not None]
        if len(known) > 1:
            best = min(known, key=lambda row: row["best_validation_loss"])
            said.append(
                f"{title}: the lowest validation loss is {best['best_validation_loss']:.4f}, "
                f"of {best['run']} at step {best['best_step']:,}."
            )
    return f'<p class="lead">{markup.escaped(" ".join(said))}</p>' if said else ""


# ---------------------------------------------------------------- tables


def swatch(place: int) -> str:
    """A piece of the line with which the run of this place is drawn."""
    return f'<i class="swatch run-{place % COLOURS} dash-{place // COLOURS % 3}" aria-hidden="true"></i>'


def _loss(value: float) -> str:
    return f"{value:.4f}"


# Label, a word more, how a value is shown, and which value is the best.
_Column = tuple[str, str, Callable[[Any], str], Callable[..., Any] | None]
_COLUMNS: dict[str, _Column] = {
    "parameters": ("parameters", "", markup.show_number, None),
    "steps": ("steps", "", markup.show_number, None),
    "tokens": ("tokens", "", markup.show_number, None),
    "seconds": ("seconds", "of training", lambda value: f"{value:,.1f}", None),
    "tokens_per_second": ("tokens/s", "median", markup.show_number, max),
    "last_validation_loss": ("validation loss", "last", _loss, min),
    "best_validation_loss": ("validation loss", "best", _loss, min),
    "precision": ("precision", "", markup.show_value, None),
}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, _Column]:
    """The columns for which some run has a value."""
    columns = dict(_COLUMNS)
    precision = columns.pop("precision")
    for name in dict.fromkeys(key for row in rows for key in row if key.endswith("_accuracy")):
        what = markup.as_words(name.removeprefix("last_validation_").removesuffix("_accuracy"))
        columns[name] = (f"{what} right", "last", lambda value: f"{100 * value:.2f} %", max)
    columns["precision"] = precision
    return {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}


def _runs_table(stage: str, rows: Sequence[Mapping[str, Any]], runs: Sequence[ComparedRun]) -> str:
    columns = _columns(rows)
    best: dict[str, Any] = {}
    for key, (_, _, _, choose) in columns.items():
        values = [row[key] for row in rows if row.get(key) is not None]
        if choose and len(set(values)) > 1:
            best[key] = choose(values)
    head = "".join(
        f'<th scope="col" class="number">{markup.escaped(label)} <small>{more}</small></th>'
        for label, more, _, _ in columns.values()
    )
    places = {run.name: place for place, run in enumerate(runs)}
    body = []
    for row in rows:
        going = ' <span class="tag grey">in progress</span>' if row["in_progress"] else ""
        cells = []
        for key, (_, _, show, _) in columns.items():
            value = row.get(key)
            said = '<span class="absent">–</span>' if value is None else show(value)
            if key == "best_validation_loss" and value is not None:
                said += f" <small>step {row['best_step']:,}</small>"
            if key in best and value == best[key]:
                said = f'<strong class="best">{said}<span class="tag good">best</span></strong>'
            cells.append(f'<td class="number">{said}</td>')
        body.append(
            f'<tr><th scope="row">{swatch(places[row["run"]])}{markup.escaped(row["run"])}{going}</th>'
            f"{''.join(cells)}</tr>"
        )
    table = f'<thead><tr><th scope="col">run</th>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
    return (
        f'<section id="runs-{stage}"><h2>{STAGES[stage]}</h2>'
        f"{markup.scrolled(f'{STAGES[stage]}: figures of each run', table, 'runs')}</section>"
    )


def _differences(runs: Sequence[ComparedRun]) -> str:
    found = differences(runs)
    head = '<section id="differences"><h2>In what they differ</h2>'
    if not found:
        said = "no setting that is known of them"
        return f"{head}<p>In {said}.</p></section>"
    columns = "".join(
        f'<th scope="col">{swatch(place)}{markup.escaped(run.name)}</th>' for place, run in enumerate(runs)
    )
    rows = "".join(
        f'<tr><th scope="row"><code>{markup.escaped(key)}</code></th>'
        + "".join(f"<td>{_setting(value)}</td>" for value in values)
        + "</tr>"
        for key, values in found.items()
    )
    table = f'<thead><tr><th scope="col">setting</th>{columns}</tr></thead><tbody>{rows}</tbody>'
    return f"{head}{markup.scrolled('settings in which the runs differ', table, 'settings')}</section>"


def _setting(value: Any) -> str:
    if value is None:
        return '<span class="absent">not set</span>'
    if markup.is_nested(value):
        text = json.dumps(value, ensure_ascii=False)
        more = " …" if len(text) > _LONGEST_SETTING else ""
        return f"<code>{markup.escaped(text[:_LONGEST_SETTING] + more)}</code>"
    return markup.show_value(value)


# ---------------------------------------------------------------- curves


def _controls(runs: Sequence[ComparedRun]) -> str:
    """The legend and the choice of the axis; shown by the script, since they do nothing without it."""
    switches = "".join(
        f'<label data-run="{place}"><input type="checkbox" checked> {swatch(place)}{markup.escaped(run.name)}</label>'
        for place, run in enumerate(runs)
    )
    axes = "".join(
        f'<label><input type="radio" name="axis" value="{name}"{" checked" if name == "step" else ""}> {label}</label>'
        for name, label in AXES.items()
    )
    return (
        '<h2 id="curves">Curves</h2><noscript><p>The curves need JavaScript; the tables above do not.</p></noscript>'
        f'<div class="controls" hidden><fieldset><legend>runs</legend>{switches}</fieldset>'
        f"<fieldset><legend>horizontal axis</legend>{axes}</fieldset></div>"
        '<p class="note">A box drawn with the pointer enlarges a part, a double click shows all again. '
        "With the keyboard: the arrow keys move along a curve, + and − enlarge, 0 shows all.</p>"
    )


def _curves(stage: str, runs: Sequence[ComparedRun]) -> str:
    figures = []
    for key in charted(runs, stage):
        caption = chart_title(key)
        caption = caption[0].upper() + caption[1:]
        if key == "loss":
            caption += ": the line is a mean over a thirtieth of the run; the single steps lie behind it"
        elif key in ("tokens_per_second", "gradient_norm"):
            caption += ", mean over a thirtieth of the run"
        wide = ' class="wide"' if key == "loss" else ""
        label = markup.escaped(f"{STAGES[stage]}: {caption}")
        figures.append(
            f'<figure{wide}><div data-chart="{stage}-{key}" role="img" tabindex="0" aria-label="{label}"></div>'
            f"<figcaption>{markup.escaped(caption)}.</figcaption></figure>"
        )
    return (
        f'<section id="{stage}"><h3>{STAGES[stage]}</h3><div class="charts">{"".join(figures)}</div>'
        f"{_marks_table(stage, runs)}</section>"
    )


def _marks_table(stage: str, runs: Sequence[ComparedRun]) -> str:
    rows = [
        (place, run.name, mark)
        for place, run in enumerate(runs)
        if stage in run.trainings
        for mark in described_marks(run, run.trainings[stage])
    ]
    if not rows:
        return ""
    shown = "".join(
        f'<tr><th scope="row">{swatch(place)}{markup.escaped(name)}</th>'
        f'<td class="number">{mark["step"]:,}</td><td>{markup.escaped(mark["said"])}</td></tr>'
        for place, name, mark in rows[: markup.MOST_ROWS]
    )
    left = len(rows) - markup.MOST_ROWS
    more = f'<p class="note">{left:,} more are left out.</p>' if left > 0 else ""
    table = (
        '<thead><tr><th scope="col">run</th><th scope="col" class="number">step</th>'
        f'<th scope="col">what happened</th></tr></thead><tbody>{shown}</tbody>'
    )
    return (
        f"<details><summary>Jumps of the loss (▲) and skipped steps (✕): {len(rows):,}</summary>"
        f"{markup.scrolled('jumps of the loss and skipped steps', table)}{more}</details>"
    )
