"""The report of a run: one HTML file that shows the whole life of a model and needs no network.

It only shows what the steps of a recipe left in the run directory; it measures nothing itself. What
a step did not leave is shown as "not made".
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lexmill import page
from lexmill.files import atomic_write
from lexmill.progress import format_duration
from lexmill.recipe import charts, markup, report_checks
from lexmill.recipe.report_data import STEPS, Run, Stage

MOST_SAMPLES = 8  # steps shown at once; the others are folded away

COLUMNS = {
    "before": "before fine-tuning",
    "after": "after fine-tuning",
    "seen_after": "after, on training data",
}
MEASURES = {
    "loss": ("loss", "nats per token, lower is better"),
    "perplexity": ("perplexity", "lower is better"),
    "bits_per_byte": ("bits per byte", "lower is better"),
    "targets": ("targets", "tokens predicted"),
    "token_accuracy": ("token accuracy", "higher is better"),
    "exact": ("exact replies", "word for word, higher is better"),
    "conversations": ("conversations", "answered in full"),
    "rougeL": ("ROUGE-L", "F-measure, higher is better"),
    "rouge1": ("ROUGE-1", "F-measure, higher is better"),
    "rouge2": ("ROUGE-2", "F-measure, higher is better"),
    "rougeLsum": ("ROUGE-Lsum", "F-measure, higher is better"),
    "bleu": ("BLEU", "percent, higher is better"),
    "chrf": ("chrF", "percent, higher is better"),
    "f1": ("F1", "higher is better"),
}
GROUPS = {
    "text": "Held-out text",
    "replies": "Replies",
    "chat": "Replies, held-out rows",
    "task": "Test rows",
    "summarise": "Summaries, held-out rows",
    "translate": "Translations, held-out rows",
    "qa": "Answers, held-out questions (percent)",
}
SHARES = {"replies": ("token_accuracy", "exact"), "chat": ("token_accuracy", "exact")}


def write_report(run: Path, out: Path) -> Path:
    """Write the report of a run as one HTML file.

    Args:
        run: the run directory; whatever is missing in it is shown as "not made".
        out: the HTML file to write; it appears whole or not at all.

    Returns:
        `out`.

    Raises:
        FileError: `out` cannot be written.
    """
    text = _page(Run.read(Path(run)))
    with atomic_write(out, "wb") as file:
        file.write(text.encode("utf-8", "replace"))  # a half of a surrogate pair becomes "?"
    return Path(out)


def _page(run: Run) -> str:
    drawn: dict[str, Any] = {}
    sections = [
        _life(run),
        *(_training(stage, drawn) for stage in run.stages if stage.name in run.steps),
        _scores(run),
        report_checks.verification(run.checks, run.diagnoses),
        _data(run.manifest),
        _lineage(run),
        _environment(run),
        _recipe(run.recipe),
    ]
    scripts = [f"/*\n{_asset('uPlot.LICENSE')}\n*/\n{_asset('uPlot.iife.min.js')}", _asset("charts.js")]
    body = "\n".join(sections)
    return page.page(
        title=f"{run.name}: report of a lexmill run",
        styles=[_asset("report.css"), _asset("uPlot.min.css")],
        body=f"""{_header(run)}
<main>
{body}
</main>
<footer>Written by lexmill from the files of the run directory.
This page loads nothing from the network.</footer>""",
        data=("chart-data", drawn),
        scripts=scripts if drawn else [],
    )


def _asset(name: str) -> str:
    return page.asset("lexmill.recipe", name)


# ---------------------------------------------------------------- the sections, from the top


def _header(run: Run) -> str:
    cells = "".join(
        f'<div><dt>{markup.escaped(name)}</dt><dd><div class="value {tone}">{value}</div>'
        f'<div class="more">{markup.escaped(more)}</div></dd></div>'
        for name, value, more, tone in _key_figures(run)
    )
    description = re.search(r'^description\s*=\s*("(?:[^"\\]|\\.)*")', run.recipe, re.MULTILINE)
    lead = ""
    if description:
        with contextlib.suppress(json.JSONDecodeError):
            lead = f'<p class="lead">{markup.escaped(json.loads(description[1]))}</p>'
    warning = ""
    if run.unreadable:
        warning = f'<p class="warning">Damaged and therefore left out: {markup.escaped(", ".join(run.unreadable))}.</p>'
    return (
        f'<header><p class="eyebrow">Report of a lexmill run</p><h1>{markup.escaped(run.name)}</h1>{lead}'
        f'{warning}<dl class="figures">{cells}</dl></header>'
    )


def _key_figures(run: Run) -> Iterable[tuple[str, str, str, str]]:
    """Name, value as HTML, a line below it, tone."""
    pretraining, finetuning = run.stages
    parameters = run.figure("pretrain", "parameters") or run.figure("base", "parameters")
    vocabulary = run.figure("tokenizer", "vocabulary")
    more = f"vocabulary of {markup.show_number(vocabulary)} tokens" if vocabulary else ""
    yield "parameters", markup.show_number(parameters) if parameters else markup.ABSENT, more, ""

    tokens = run.figure("pretrain", "tokens") or pretraining.tokens
    then = run.figure("finetune", "tokens") or finetuning.tokens
    more = f"then {markup.show_number(then)} in fine-tuning" if then else ""
    if "base" in run.steps:
        tokens, more = then, "in fine-tuning" if then else ""
    yield "training tokens", markup.show_number(tokens) if tokens else markup.ABSENT, more, ""

    where = finetuning if "base" in run.steps else pretraining
    losses = list(where.series("validation_loss").values())
    value = (
        " → ".join(f"{loss:.3f}" for loss in dict.fromkeys((losses[0], losses[-1])))
        if losses
        else markup.ABSENT
    )
    stage = where.title.lower()
    unit = "nats per target" if where is finetuning else "nats per token"
    more = f"{unit}, first → last in {stage}" if len(losses) > 1 else f"{unit}, in {stage}"
    yield "validation loss", value, more if losses else "", ""

    if own := markup.as_dict(run.scores.get("pretraining")):
        accuracy = own.get("tokens accuracy")
        value = f"{100 * float(accuracy or 0):.1f} %" if markup.is_finite(accuracy) else markup.ABSENT
        yield "right first guesses", value, "of hidden tokens in held-out text", ""
    elif task := markup.as_dict(run.scores.get("task")):
        yield _task_figure(task)
    else:
        yield _bits_per_byte(run)

    took = {step: seconds for step, *_ in STEPS if (seconds := run.seconds(step)) is not None}
    more = f"{len(took)} of {len([step for step, *_ in STEPS if step in run.steps])} steps"
    if cpu := run.environment.get("cpu"):
        more += f" on {cpu}"
    yield (
        "total time",
        format_duration(sum(took.values())) if took else markup.ABSENT,
        more if took else "",
        "",
    )

    yield "verify", *report_checks.overall_verdict(run.checks)


def _task_figure(task: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """The first figure of a task, on its test rows."""
    before, after = markup.as_dict(task.get("before")), markup.as_dict(task.get("after"))
    name = next(iter(after), "")
    found = [side[name] for side in (before, after) if markup.is_finite(side.get(name))]
    label = MEASURES.get(name, (markup.as_words(name), ""))[0]
    value = " → ".join(f"{figure:.4g}" for figure in found) or markup.ABSENT
    return label, value, "test rows, before → after" if len(found) > 1 else "test rows", ""


def _bits_per_byte(run: Run) -> tuple[str, str, str, str]:
    text = markup.as_dict(run.scores.get("text"))
    before, after = (markup.as_dict(text.get(key)).get("bits_per_byte") for key in ("before", "after"))
    shown = after if markup.is_finite(after) else before
    more = (
        "held-out text, after fine-tuning" if markup.is_finite(after) else "held-out text, before fine-tuning"
    )
    if markup.is_finite(after) and markup.is_finite(before):
        more += f" (before: {before:.3f})"
    found = markup.is_finite(shown)
    return "bits per byte", f"{shown:.3f}" if found else markup.ABSENT, more if found else "", ""


def _life(run: Run) -> str:
    longest = max((run.seconds(step) or 0.0 for step, *_ in STEPS), default=0.0)
    boxes = []
    for step, title, makes, anchor in STEPS:
        if step not in run.steps:
            continue
        seconds = run.seconds(step)
        link = f'<a href="#{anchor}">{title}</a>'
        if not run.records[step]:
            boxes.append(f'<li class="undone">{link}<span class="seconds">{markup.ABSENT}</span>{makes}</li>')
            continue
        width = 100 * (seconds or 0) / max(longest, 1e-9)
        share = f'<span class="share"><i style="width:{width:.1f}%"></i></span>'
        took = "?" if seconds is None else markup.show_seconds(seconds)
        boxes.append(f'<li>{link}<span class="seconds">{took}</span>{share}{makes}</li>')
    return f'<section id="life"><h2>Its life</h2><ol class="life">{"".join(boxes)}</ol></section>'


def _training(stage: Stage, drawn: dict[str, Any]) -> str:
    parts = [f'<section id="{stage.name}"><h2>{stage.title}</h2>']
    figures = []
    if chart := charts.loss_chart(stage):
        drawn[f"{stage.name}-loss"] = chart
        figures.append(
            charts.chart_figure(
                f"{stage.name}-loss", f"{stage.title}: loss by step", charts.loss_caption(stage)
            )
        )
    speeds = stage.series("tokens_per_second")
    if speeds:
        drawn[f"{stage.name}-speed"] = charts.chart_data(
            "tokens per second",
            {"tokens per second": ("line", charts.thinned(speeds))},
            digits=0,
            from_zero=True,
        )
        middle = sorted(speeds.values())[len(speeds) // 2]
        caption = f"Speed: {middle:,.0f} tokens a second in the median step."
        figures.append(
            charts.chart_figure(f"{stage.name}-speed", f"{stage.title}: tokens per second by step", caption)
        )
    if figures:
        parts.append(f'<div class="charts">{"".join(figures)}</div>')
        parts.append("<noscript><p>The curves need JavaScript; the figures below them do not.</p></noscript>")
    else:
        parts.append(f"<p>Curves: {markup.ABSENT}</p>")
    parts += ["<h3>What it said as training went on</h3>", _samples(stage), "</section>"]
    return "".join(parts)


def _samples(stage: Stage) -> str:
    by_step: dict[Any, list[dict[str, Any]]] = {}
    for sample in stage.samples:
        step = sample.get("step")
        by_step.setdefault(step if isinstance(step, int) else str(step), []).append(sample)
    if not by_step:
        return f"<p>Samples: {markup.ABSENT}</p>"
    validation = stage.series("validation_loss")
    entries = {}
    for step, samples in by_step.items():
        said = f", validation loss {validation[step]:.3f}" if step in validation else ""
        texts = "".join(_sample(sample, stage.name == "finetune") for sample in samples)
        entries[step] = f'<li><span class="step">step {markup.show_number(step)}{said}</span>{texts}</li>'
    steps = list(entries)
    last = len(steps) - 1
    shown = {steps[round(place * last / max(MOST_SAMPLES - 1, 1))] for place in range(MOST_SAMPLES)}
    rows = "".join(entry for step, entry in entries.items() if step in shown)
    folded = "".join(entry for step, entry in entries.items() if step not in shown)
    page = f'<ol class="timeline">{rows}</ol>'
    if folded:
        count = len(entries) - len(shown)
        page += f'<details><summary>{count:,} more</summary><ol class="timeline">{folded}</ol></details>'
    return page


def _sample(sample: Mapping[str, Any], reply: bool) -> str:
    prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
    if prompt and not reply and text.startswith(prompt):  # some samplers return both
        text = text[len(prompt) :]
    said = markup.escaped(markup.shortened(text)) if text.strip() else '<span class="absent">(nothing)</span>'
    kind = "sample reply" if reply else "sample"
    return f'<p class="{kind}"><b>{markup.escaped(markup.shortened(prompt))}</b>{said}</p>'


def _scores(run: Run) -> str:
    scores = run.scores
    title = "Before and after fine-tuning" if "finetune" in run.steps else "Scores"
    parts = [f'<section id="scores"><h2>{title}</h2>']
    if not scores:
        return f"{parts[0]}<p>{markup.ABSENT}</p></section>"
    tables = {key: value for key, value in scores.items() if key not in ("examples", "fill")}
    if cases := markup.as_dicts(scores.get("fill")):
        kept = ("text", "expected", "said", "passed")
        tables["gaps filled"] = [{key: case[key] for key in kept if key in case} for case in cases]
    compared = {key: value for key, value in tables.items() if _is_comparison(value)}
    if compared:
        parts.append(_comparison(compared))
    rest = {
        key: value for key, value in tables.items() if key not in compared and value not in ({}, [], None)
    }
    if rest:
        parts.append(markup.show_any(rest))
    examples = markup.as_dicts(scores.get("examples"))
    if examples:
        cards = "".join(map(_example, examples[: markup.MOST_ROWS]))
        parts.append(f'<h3>Questions and answers</h3><div class="examples">{cards}</div>')
    return "".join(parts) + "</section>"


def _is_comparison(value: Any) -> bool:
    """A dict of dicts of plain figures: columns of one table."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(column, dict) and not any(map(markup.is_nested, column.values()))
            for column in value.values()
        )
    )


def _comparison(groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    columns = list(dict.fromkeys([*COLUMNS, *(name for group in groups.values() for name in group)]))
    columns = [name for name in columns if any(name in group for group in groups.values())]
    head = "".join(
        f'<th scope="col" class="number">{markup.escaped(COLUMNS.get(name, markup.as_words(name)))}</th>'
        for name in columns
    )
    rows = []
    for key, group in groups.items():
        rows.append(
            f'<tr class="group"><th scope="rowgroup" colspan="{len(columns) + 1}">'
            f"{markup.escaped(GROUPS.get(key, markup.as_words(key)))}</th></tr>"
        )
        for measure in dict.fromkeys(name for column in group.values() for name in column):
            label, unit = MEASURES.get(measure, (markup.as_words(measure), ""))
            cells = "".join(
                f'<td class="number">{_score(key, measure, group.get(name, {}).get(measure))}</td>'
                for name in columns
            )
            rows.append(
                f'<tr><th scope="row">{markup.escaped(label)} <small>{markup.escaped(unit)}</small></th>{cells}</tr>'
            )
    return markup.scrolled(
        "scores", f'<thead><tr><th scope="col">measure</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
    )


def _score(group: str, measure: str, value: Any) -> str:
    if measure in SHARES.get(group, ()) and markup.is_finite(value):
        return f"{100 * value:.1f} %"
    return "" if value is None else markup.show_value(value)


def _example(example: Mapping[str, Any]) -> str:
    tags = []
    if split := example.get("split"):
        tags.append(f'<span class="tag grey">{markup.escaped(split)}</span>')
    if "after" in example and str(example["after"]).strip() == str(example.get("expected")).strip():
        tags.append('<span class="tag good">exact</span>')
    pairs = "".join(
        f"<dt>{markup.escaped(markup.as_words(name))}</dt><dd>{markup.escaped(markup.shortened(str(value))) or '(nothing)'}</dd>"
        for name, value in example.items()
        if name not in ("question", "split")
    )
    return (
        f'<article><span class="tags">{" ".join(tags)}</span>'
        f'<h4>{markup.escaped(markup.shortened(str(example.get("question", ""))))}</h4><dl class="pairs">{pairs}</dl></article>'
    )


def _data(manifest: Mapping[str, Any]) -> str:
    head = '<section id="data"><h2>Data</h2>'
    if not manifest:
        return f"{head}<p>{markup.ABSENT}</p></section>"
    parts = [head]
    counts = [
        {"split": split, "kind": kind, **count}
        for split, kinds in markup.as_dict(manifest.get("counts")).items()
        for kind, count in markup.as_dict(kinds).items()
        if isinstance(count, dict) and count.get("documents") != 0
    ]
    if counts:
        parts.append(markup.html_table("documents by split and kind", counts))
    dropped = markup.as_dict(manifest.get("dropped"))
    said = (
        ", ".join(
            f"{markup.show_value(count)} ({markup.escaped(reason)})" for reason, count in dropped.items()
        )
        or "none"
    )
    parts.append(f"<p>Documents dropped: {said}.</p>")
    files = markup.as_dicts(manifest.get("files"))
    if files:
        names = ("path", "license", "language", "documents", "kept", "bytes", "sha256")
        rows = [{name: file.get(name) for name in names} for file in files]
        for row in rows:
            row["license"] = row["license"] or "not stated"
        licences = ", ".join(sorted({str(row["license"]) for row in rows}))
        parts.append(f"<h3>Where it comes from</h3><p>Licences: {markup.escaped(licences)}.</p>")
        parts.append(markup.html_table("raw files", rows))
    return "".join(parts) + "</section>"


def _lineage(run: Run) -> str:
    parts = ['<section id="lineage"><h2>Lineage</h2>']
    lineage = {key: value for key, value in run.lineage.items() if key != "scores"}
    parts.append(markup.show_any(lineage) if lineage else f"<p>{markup.ABSENT}</p>")
    for step, title, *_ in STEPS:
        record = run.records[step]
        if not record:
            continue
        shown = {key: record[key] for key in ("key", "code", "figures", "parts", "inputs") if record.get(key)}
        outputs = [
            {"file": path, **(entry if isinstance(entry, dict) else {"": entry})}
            for path, entry in markup.as_dict(record.get("outputs")).items()
        ]
        table = markup.html_table(f"files of {step}", outputs) if outputs else ""
        parts.append(
            f"<details><summary>{title}: figures, inputs and files</summary>{markup.show_any(shown)}{table}</details>"
        )
    return "".join(parts) + "</section>"


def _environment(run: Run) -> str:
    shown = markup.show_any(run.environment) if run.environment else f"<p>{markup.ABSENT}</p>"
    if verified := markup.as_dict(run.verification.get("environment")):
        shown += f"<details><summary>Where the runtimes were compared</summary>{markup.show_any(verified)}</details>"
    return f'<section id="environment"><h2>Environment</h2>{shown}</section>'


def _recipe(recipe: str) -> str:
    shown = f"<p>{markup.ABSENT}</p>"
    if recipe:
        shown = (
            f"<details><summary>The resolved recipe</summary><pre>{markup.escaped(recipe)}</pre></details>"
        )
    return f'<section id="recipe"><h2>Recipe</h2>{shown}</section>'


# ---------------------------------------------------------------- values as HTML
