"""The report of a run: one HTML file that shows the whole life of a model and needs no network.

It only shows what the steps of a recipe left in the run directory; it measures nothing itself. What
a step did not leave is shown as "not made".
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from lexmill.errors import LexmillError
from lexmill.files import atomic_write, read_json
from lexmill.progress import format_duration
from lexmill.train.metrics import read_metrics

ABSENT = '<span class="absent">not made</span>'
MOST_POINTS = 1500  # of a curve; more are thinned out
MOST_SAMPLES = 8  # steps shown at once; the others are folded away
MOST_ROWS = 200  # of a table
MOST_CHARACTERS = 4000  # of one text

# step, title, what it makes, and where on the page to read more
STEPS = (
    ("prepare", "Prepare", "documents from raw files", "data"),
    ("tokenizer", "Tokenizer", "a vocabulary", "data"),
    ("pretrain", "Pretrain", "a base model", "pretrain"),
    ("finetune", "Fine-tune", "a model that answers", "finetune"),
    ("evaluate", "Evaluate", "scores", "scores"),
    ("export", "Export", "files for other runtimes", "lineage"),
    ("verify", "Verify", "runtimes compared", "verify"),
)
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
}
GROUPS = {"text": "Held-out text", "replies": "Replies"}
SHARES = ("token_accuracy", "exact")
VERDICTS = {True: ("good", "equal"), False: ("bad", "different"), None: ("grey", "not checked")}


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
    page = _page(_Run.read(Path(run)))
    with atomic_write(out, "wb") as file:
        file.write(page.encode("utf-8", "replace"))  # a half of a surrogate pair becomes "?"
    return Path(out)


@dataclass
class _Stage:
    """What training left: its curves and its samples."""

    name: str
    title: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str) -> dict[int, float]:
        """The finite values of a figure by step."""
        return {
            line["step"]: line[key]
            for line in self.metrics
            if isinstance(line.get("step"), int) and _is_finite(line.get(key))
        }

    @property
    def tokens(self) -> int | None:
        """Tokens seen in the whole of this training."""
        return max((int(tokens) for tokens in self.series("tokens").values()), default=None)


@dataclass
class _Run:
    """Everything that the page shows, read leniently."""

    name: str
    recipe: str
    records: dict[str, dict[str, Any]]
    manifest: dict[str, Any]
    stages: tuple[_Stage, ...]
    scores: dict[str, Any]
    verification: dict[str, Any]
    lineage: dict[str, Any]
    environment: dict[str, Any]
    unreadable: list[str]

    @classmethod
    def read(cls, run: Path) -> _Run:
        """Read a run directory; what is damaged is listed in `unreadable`."""
        unreadable: list[str] = []

        def table(path: str) -> dict[str, Any]:
            if not (run / path).is_file():
                return {}
            try:
                value = read_json(run / path)
            except (LexmillError, OSError, ValueError):
                value = None
            if not isinstance(value, dict):
                unreadable.append(path)
                return {}
            return value

        recipe = run / "recipe.toml"
        try:
            recipe_text = recipe.read_text("utf-8", "replace") if recipe.is_file() else ""
        except OSError:
            recipe_text = ""
            unreadable.append(recipe.name)
        return cls(
            name=run.resolve().name,
            recipe=recipe_text,
            records={step: table(f"{step}/step.json") for step, *_ in STEPS},
            manifest=table("prepare/manifest.json"),
            stages=tuple(
                _Stage(
                    step, title, _lines(run / step / "metrics.jsonl"), _lines(run / step / "samples.jsonl")
                )
                for step, title in (("pretrain", "Pretraining"), ("finetune", "Fine-tuning"))
            ),
            scores=table("evaluate/scores.json"),
            verification=table("verify.json"),
            lineage=table("model/lexmill.json"),
            environment=table("environment.json"),
            unreadable=unreadable,
        )

    def figure(self, step: str, name: str) -> Any:
        """A figure that a step remembered, or None."""
        return _dict(self.records[step].get("figures")).get(name)

    def seconds(self, step: str) -> float | None:
        """How long a step took."""
        seconds = self.records[step].get("seconds")
        return seconds if _is_finite(seconds) else None

    @property
    def checks(self) -> list[dict[str, Any]]:
        """The checks of the runtimes."""
        return _dicts(self.verification.get("checks"))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_metrics(path))
    except (OSError, ValueError, RecursionError):  # ValueError: a number of thousands of digits
        return []


def _page(run: _Run) -> str:
    charts: dict[str, Any] = {}
    sections = [
        _life(run),
        *(_training(stage, charts) for stage in run.stages),
        _scores(run.scores),
        _verification(run.checks),
        _data(run.manifest),
        _lineage(run),
        _environment(run),
        _recipe(run.recipe),
    ]
    scripts = [f"/*\n{_asset('uPlot.LICENSE')}\n*/\n{_asset('uPlot.iife.min.js')}", _asset("charts.js")]
    if not charts:
        scripts = []
    # Scripts run only if they are these two, and nothing is loaded from anywhere.
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src {' '.join(map(_script_hash, scripts)) or chr(39) + 'none' + chr(39)}"
    )
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_text(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(run.name)}: report of a lexmill run</title>
<style>
{_asset("uPlot.min.css")}
{_asset("report.css")}</style>
</head>
<body>
{_header(run)}
<main>
{body}
</main>
<footer>Written by lexmill from the files of the run directory. This page loads nothing from the network.</footer>
<script type="application/json" id="chart-data">{_script_json(charts)}</script>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""


def _asset(name: str) -> str:
    return resources.files("lexmill.recipe").joinpath("assets").joinpath(name).read_text("utf-8")


def _script_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode()}'"


def _script_json(value: Any) -> str:
    """JSON that can stand inside <script>: only ASCII, and no `<` that could end or comment out the block."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------------------------------------------------------------- the sections, from the top


def _header(run: _Run) -> str:
    cells = "".join(
        f'<div><dt>{_text(name)}</dt><dd><div class="value {tone}">{value}</div>'
        f'<div class="more">{_text(more)}</div></dd></div>'
        for name, value, more, tone in _key_figures(run)
    )
    description = re.search(r'^description\s*=\s*("(?:[^"\\]|\\.)*")', run.recipe, re.MULTILINE)
    lead = ""
    if description:
        with contextlib.suppress(json.JSONDecodeError):
            lead = f'<p class="lead">{_text(json.loads(description[1]))}</p>'
    warning = ""
    if run.unreadable:
        warning = (
            f'<p class="warning">Damaged and therefore left out: {_text(", ".join(run.unreadable))}.</p>'
        )
    return (
        f'<header><p class="eyebrow">Report of a lexmill run</p><h1>{_text(run.name)}</h1>{lead}'
        f'{warning}<dl class="figures">{cells}</dl></header>'
    )


def _key_figures(run: _Run) -> Iterable[tuple[str, str, str, str]]:
    """Name, value as HTML, a line below it, tone."""
    pretraining, finetuning = run.stages
    parameters = run.figure("pretrain", "parameters")
    vocabulary = run.figure("tokenizer", "vocabulary")
    more = f"vocabulary of {_number(vocabulary)} tokens" if vocabulary else ""
    yield "parameters", _number(parameters) if parameters else ABSENT, more, ""

    tokens = run.figure("pretrain", "tokens") or pretraining.tokens
    then = run.figure("finetune", "tokens") or finetuning.tokens
    more = f"then {_number(then)} in fine-tuning" if then else ""
    yield "training tokens", _number(tokens) if tokens else ABSENT, more, ""

    losses = list(pretraining.series("validation_loss").values())
    value = " → ".join(f"{loss:.3f}" for loss in dict.fromkeys((losses[0], losses[-1]))) if losses else ABSENT
    more = (
        "nats per token, first → last in pretraining" if len(losses) > 1 else "nats per token, in pretraining"
    )
    yield "validation loss", value, more if losses else "", ""

    text = _dict(run.scores.get("text"))
    before, after = (_dict(text.get(key)).get("bits_per_byte") for key in ("before", "after"))
    shown = after if _is_finite(after) else before
    more = "held-out text, after fine-tuning" if _is_finite(after) else "held-out text, before fine-tuning"
    if _is_finite(after) and _is_finite(before):
        more += f" (before: {before:.3f})"
    found = _is_finite(shown)
    yield "bits per byte", f"{shown:.3f}" if found else ABSENT, more if found else "", ""

    took = {step: seconds for step, *_ in STEPS if (seconds := run.seconds(step)) is not None}
    more = f"{len(took)} of {len(STEPS)} steps"
    if cpu := run.environment.get("cpu"):
        more += f" on {cpu}"
    yield "total time", format_duration(sum(took.values())) if took else ABSENT, more if took else "", ""

    yield "verify", *_verdict(run.checks)


def _verdict(checks: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    if not checks:
        return ABSENT, "", ""
    passed = [_passed(check) for check in checks]
    equal, different, unchecked = passed.count(True), passed.count(False), passed.count(None)
    more = [f"{different:,} different"] if different else []
    if unchecked:
        more.append(f"{unchecked:,} not checked")
    tone = "bad" if different else "good" if equal else "grey"
    return f"{equal:,} of {len(checks):,} checks equal", ", ".join(more) or "all were checked", tone


def _life(run: _Run) -> str:
    longest = max((run.seconds(step) or 0.0 for step, *_ in STEPS), default=0.0)
    boxes = []
    for step, title, makes, anchor in STEPS:
        seconds = run.seconds(step)
        link = f'<a href="#{anchor}">{title}</a>'
        if not run.records[step]:
            boxes.append(f'<li class="undone">{link}<span class="seconds">{ABSENT}</span>{makes}</li>')
            continue
        share = f'<span class="share"><i style="width:{100 * (seconds or 0) / max(longest, 1e-9):.1f}%"></i></span>'
        took = "?" if seconds is None else _seconds(seconds)
        boxes.append(f'<li>{link}<span class="seconds">{took}</span>{share}{makes}</li>')
    return f'<section id="life"><h2>Its life</h2><ol class="life">{"".join(boxes)}</ol></section>'


def _training(stage: _Stage, charts: dict[str, Any]) -> str:
    parts = [f'<section id="{stage.name}"><h2>{stage.title}</h2>']
    figures = []
    if chart := _loss_chart(stage):
        charts[f"{stage.name}-loss"] = chart
        figures.append(_figure(f"{stage.name}-loss", f"{stage.title}: loss by step", _loss_caption(stage)))
    speeds = stage.series("tokens_per_second")
    if speeds:
        charts[f"{stage.name}-speed"] = _chart(
            "tokens per second", {"tokens per second": ("line", _thin(speeds))}, digits=0, from_zero=True
        )
        middle = sorted(speeds.values())[len(speeds) // 2]
        caption = f"Speed: {middle:,.0f} tokens a second in the median step."
        figures.append(_figure(f"{stage.name}-speed", f"{stage.title}: tokens per second by step", caption))
    if figures:
        parts.append(f'<div class="charts">{"".join(figures)}</div>')
        parts.append("<noscript><p>The curves need JavaScript; the figures below them do not.</p></noscript>")
    else:
        parts.append(f"<p>Curves: {ABSENT}</p>")
    parts += ["<h3>What it said as training went on</h3>", _samples(stage), "</section>"]
    return "".join(parts)


def _figure(name: str, label: str, caption: str) -> str:
    return (
        f'<figure><div data-chart="{name}" role="img" aria-label="{_text(label)}. {_text(caption)}"></div>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _loss_chart(stage: _Stage) -> dict[str, Any] | None:
    loss, validation = stage.series("loss"), stage.series("validation_loss")
    curves: dict[str, tuple[str, dict[int, float]]] = {}
    if loss:
        curves["training"] = ("faint", _thin(loss))
        curves["training, smoothed"] = ("line", _thin(_smooth(loss)))
    if validation:
        curves["validation"] = ("points", _thin(validation))
    return _chart("loss (nats per token)", curves, digits=4) if curves else None


def _loss_caption(stage: _Stage) -> str:
    loss, validation = stage.series("loss"), stage.series("validation_loss")
    said = []
    if loss:
        first, last = next(iter(loss.values())), list(_smooth(loss).values())[-1]
        steps = f"{max(loss):,} step" + ("s" if max(loss) != 1 else "")
        said.append(f"Training loss {first:.3f} at first, {last:.3f} (smoothed) after {steps}.")
    if validation:
        best = min(validation, key=lambda step: validation[step])
        last_step = list(validation)[-1]
        said.append(f"Validation loss {validation[last_step]:.3f} in the end")
        said[-1] += "." if best == last_step else f", {validation[best]:.3f} at best (step {best:,})."
    return " ".join(said)


def _chart(
    label: str, curves: Mapping[str, tuple[str, dict[int, float]]], *, digits: int, from_zero: bool = False
) -> dict[str, Any]:
    """What charts.js draws: all curves over one row of steps, null where a curve has no value."""
    steps = sorted({step for _, values in curves.values() for step in values})
    return {
        "x": steps,
        "x_label": "step",
        "y_label": label,
        "digits": digits,
        "from_zero": from_zero,
        "series": [
            {"label": name, "look": look, "values": [_rounded(values.get(step)) for step in steps]}
            for name, (look, values) in curves.items()
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _smooth(values: Mapping[int, float]) -> dict[int, float]:
    """An exponential moving average over a thirtieth of the curve, without the bias of its start."""
    decay = 1 - 2 / (max(1.0, len(values) / 30) + 1)
    mean, weight, smoothed = 0.0, 0.0, {}
    for step, value in values.items():
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed[step] = mean / weight
    return smoothed


def _thin(values: Mapping[int, float]) -> dict[int, float]:
    """At most `MOST_POINTS` of them, evenly chosen; the first and the last stay."""
    steps = list(values)
    if len(steps) > MOST_POINTS:
        last = len(steps) - 1
        steps = [steps[round(place * last / (MOST_POINTS - 1))] for place in range(MOST_POINTS)]
    return {step: values[step] for step in steps}


def _samples(stage: _Stage) -> str:
    by_step: dict[Any, list[dict[str, Any]]] = {}
    for sample in stage.samples:
        step = sample.get("step")
        by_step.setdefault(step if isinstance(step, int) else str(step), []).append(sample)
    if not by_step:
        return f"<p>Samples: {ABSENT}</p>"
    validation = stage.series("validation_loss")
    entries = {}
    for step, samples in by_step.items():
        said = f", validation loss {validation[step]:.3f}" if step in validation else ""
        texts = "".join(_sample(sample, stage.name == "finetune") for sample in samples)
        entries[step] = f'<li><span class="step">step {_number(step)}{said}</span>{texts}</li>'
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
    said = _text(_cut(text)) if text.strip() else '<span class="absent">(nothing)</span>'
    kind = "sample reply" if reply else "sample"
    return f'<p class="{kind}"><b>{_text(_cut(prompt))}</b>{said}</p>'


def _scores(scores: Mapping[str, Any]) -> str:
    parts = ['<section id="scores"><h2>Before and after fine-tuning</h2>']
    if not scores:
        return f"{parts[0]}<p>{ABSENT}</p></section>"
    tables = {key: value for key, value in scores.items() if key != "examples"}
    compared = {key: value for key, value in tables.items() if _is_comparison(value)}
    if compared:
        parts.append(_comparison(compared))
    rest = {
        key: value for key, value in tables.items() if key not in compared and value not in ({}, [], None)
    }
    if rest:
        parts.append(_show(rest))
    examples = _dicts(scores.get("examples"))
    if examples:
        cards = "".join(map(_example, examples[:MOST_ROWS]))
        parts.append(f'<h3>Questions and answers</h3><div class="examples">{cards}</div>')
    return "".join(parts) + "</section>"


def _is_comparison(value: Any) -> bool:
    """A dict of dicts of plain figures: columns of one table."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(column, dict) and not any(map(_is_nested, column.values()))
            for column in value.values()
        )
    )


def _comparison(groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    columns = list(dict.fromkeys([*COLUMNS, *(name for group in groups.values() for name in group)]))
    columns = [name for name in columns if any(name in group for group in groups.values())]
    head = "".join(
        f'<th scope="col" class="number">{_text(COLUMNS.get(name, _words(name)))}</th>' for name in columns
    )
    rows = []
    for key, group in groups.items():
        rows.append(
            f'<tr class="group"><th scope="rowgroup" colspan="{len(columns) + 1}">'
            f"{_text(GROUPS.get(key, _words(key)))}</th></tr>"
        )
        for measure in dict.fromkeys(name for column in group.values() for name in column):
            label, unit = MEASURES.get(measure, (_words(measure), ""))
            cells = "".join(
                f'<td class="number">{_score(measure, group.get(name, {}).get(measure))}</td>'
                for name in columns
            )
            rows.append(f'<tr><th scope="row">{_text(label)} <small>{_text(unit)}</small></th>{cells}</tr>')
    return _scroll(
        "scores", f'<thead><tr><th scope="col">measure</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
    )


def _score(measure: str, value: Any) -> str:
    if measure in SHARES and _is_finite(value):
        return f"{100 * value:.1f} %"
    return "" if value is None else _value(value)


def _example(example: Mapping[str, Any]) -> str:
    tags = []
    if split := example.get("split"):
        tags.append(f'<span class="tag grey">{_text(split)}</span>')
    if "after" in example and str(example["after"]).strip() == str(example.get("expected")).strip():
        tags.append('<span class="tag good">exact</span>')
    pairs = "".join(
        f"<dt>{_text(_words(name))}</dt><dd>{_text(_cut(str(value))) or '(nothing)'}</dd>"
        for name, value in example.items()
        if name not in ("question", "split")
    )
    return (
        f'<article><span class="tags">{" ".join(tags)}</span>'
        f'<h4>{_text(_cut(str(example.get("question", ""))))}</h4><dl class="pairs">{pairs}</dl></article>'
    )


def _verification(checks: Sequence[Mapping[str, Any]]) -> str:
    head = '<section id="verify"><h2>Do all runtimes agree?</h2>'
    if not checks:
        return f"{head}<p>{ABSENT}</p></section>"
    runtimes: dict[str, list[Mapping[str, Any]]] = {}
    for check in checks:
        runtimes.setdefault(str(check.get("runtime", "")), []).append(check)
    bodies = []
    for runtime, group in runtimes.items():
        verdict, more, _ = _verdict(group)
        rows = "".join(map(_check, group))
        said = f"{verdict}, {more}" if more.startswith(tuple("0123456789")) else verdict
        bodies.append(
            f'<tbody><tr class="group"><th scope="rowgroup" colspan="5">{_text(runtime)} '
            f"<span>{said}</span></th></tr>{rows}</tbody>"
        )
    verdict, more, _ = _verdict(checks)
    columns = "".join(
        f'<th scope="col"{kind}>{name}</th>'
        for name, kind in (
            ("check", ""),
            ("result", ""),
            ("figure", ' class="number"'),
            ("tolerance", ' class="number"'),
            ("detail", ""),
        )
    )
    return (
        f"{head}<p>{verdict}; {more}. The same model in different runtimes, compared with lexmill's own. "
        "“Not checked” says nothing either way.</p>"
        + _scroll("checks of the runtimes", f"<thead><tr>{columns}</tr></thead>{''.join(bodies)}", "checks")
        + "</section>"
    )


def _check(check: Mapping[str, Any]) -> str:
    tone, word = VERDICTS[_passed(check)]
    figure, tolerance = (
        "" if check.get(name) is None else _value(check[name], short=True) for name in ("figure", "tolerance")
    )
    detail = check.get("detail")
    return (
        f'<tr><th scope="row">{_text(check.get("check", ""))}</th><td><span class="tag {tone}">{word}</span></td>'
        f'<td class="number" data-label="figure">{figure}</td>'
        f'<td class="number" data-label="tolerance">{tolerance}</td>'
        f"<td>{'' if detail is None else _show(detail)}</td></tr>"
    )


def _passed(check: Mapping[str, Any]) -> bool | None:
    """Only a plain `true` is a pass; what is neither true nor false was not checked."""
    passed = check.get("passed")
    return passed if isinstance(passed, bool) else None


def _data(manifest: Mapping[str, Any]) -> str:
    head = '<section id="data"><h2>Data</h2>'
    if not manifest:
        return f"{head}<p>{ABSENT}</p></section>"
    parts = [head]
    counts = [
        {"split": split, "kind": kind, **count}
        for split, kinds in _dict(manifest.get("counts")).items()
        for kind, count in _dict(kinds).items()
        if isinstance(count, dict) and count.get("documents") != 0
    ]
    if counts:
        parts.append(_table("documents by split and kind", counts))
    dropped = _dict(manifest.get("dropped"))
    said = ", ".join(f"{_value(count)} ({_text(reason)})" for reason, count in dropped.items()) or "none"
    parts.append(f"<p>Documents dropped: {said}.</p>")
    files = _dicts(manifest.get("files"))
    if files:
        names = ("path", "license", "language", "documents", "kept", "bytes", "sha256")
        rows = [{name: file.get(name) for name in names} for file in files]
        for row in rows:
            row["license"] = row["license"] or "not stated"
        licences = ", ".join(sorted({str(row["license"]) for row in rows}))
        parts.append(f"<h3>Where it comes from</h3><p>Licences: {_text(licences)}.</p>")
        parts.append(_table("raw files", rows))
    return "".join(parts) + "</section>"


def _lineage(run: _Run) -> str:
    parts = ['<section id="lineage"><h2>Lineage</h2>']
    lineage = {key: value for key, value in run.lineage.items() if key != "scores"}
    parts.append(_show(lineage) if lineage else f"<p>{ABSENT}</p>")
    for step, title, *_ in STEPS:
        record = run.records[step]
        if not record:
            continue
        shown = {key: record[key] for key in ("key", "code", "figures", "parts", "inputs") if record.get(key)}
        outputs = [
            {"file": path, **(entry if isinstance(entry, dict) else {"": entry})}
            for path, entry in _dict(record.get("outputs")).items()
        ]
        table = _table(f"files of {step}", outputs) if outputs else ""
        parts.append(
            f"<details><summary>{title}: figures, inputs and files</summary>{_show(shown)}{table}</details>"
        )
    return "".join(parts) + "</section>"


def _environment(run: _Run) -> str:
    shown = _show(run.environment) if run.environment else f"<p>{ABSENT}</p>"
    if verified := _dict(run.verification.get("environment")):
        shown += f"<details><summary>Where the runtimes were compared</summary>{_show(verified)}</details>"
    return f'<section id="environment"><h2>Environment</h2>{shown}</section>'


def _recipe(recipe: str) -> str:
    shown = f"<p>{ABSENT}</p>"
    if recipe:
        shown = f"<details><summary>The resolved recipe</summary><pre>{_text(recipe)}</pre></details>"
    return f'<section id="recipe"><h2>Recipe</h2>{shown}</section>'


# ---------------------------------------------------------------- values as HTML


def _show(value: Any, depth: int = 0) -> str:
    """Any JSON value: a dict as pairs, a list of dicts as a table, the rest as text."""
    if not _is_nested(value):
        return _value(value)
    if depth > 5:
        return f"<code>{_text(_cut(json.dumps(value, ensure_ascii=False, default=str)))}</code>"
    if isinstance(value, dict):
        items = list(value.items())
        pairs = "".join(
            f"<dt>{_text(_words(str(name)))}</dt><dd>{_show(inner, depth + 1)}</dd>"
            for name, inner in items[:MOST_ROWS]
        )
        left = (
            f'<p class="note">{len(items) - MOST_ROWS:,} more are left out.</p>'
            if len(items) > MOST_ROWS
            else ""
        )
        return f'<dl class="pairs">{pairs}</dl>{left}'
    if value and all(isinstance(row, dict) for row in value):
        return _table("values", value, depth + 1)
    if not any(map(_is_nested, value)):
        return ", ".join(_value(item) for item in value[:MOST_ROWS])
    return "".join(f"<div>{_show(item, depth + 1)}</div>" for item in value[:MOST_ROWS])


def _table(label: str, rows: Sequence[Mapping[str, Any]], depth: int = 0) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    numbers = {
        name for name in names if all(_is_number(row[name]) for row in rows if row.get(name) is not None)
    }
    kind = {name: ' class="number"' if name in numbers else "" for name in names}
    head = "".join(f'<th scope="col"{kind[name]}>{_text(_words(str(name)))}</th>' for name in names)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{kind[name]}>{_show(row[name], depth + 1) if row.get(name) is not None else ''}</td>"
            for name in names
        )
        + "</tr>"
        for row in rows[:MOST_ROWS]
    )
    left = (
        f'<p class="note">{len(rows) - MOST_ROWS:,} more are left out.</p>' if len(rows) > MOST_ROWS else ""
    )
    return _scroll(label, f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>") + left


def _scroll(label: str, table: str, kind: str = "") -> str:
    """A table in a box that scrolls sideways on a narrow screen, also by keyboard."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(label)}">'
        f'<table class="{f"data {kind}".strip()}">{table}</table></div>'
    )


def _value(value: Any, short: bool = False) -> str:
    """One plain JSON value as HTML."""
    if value is None:
        return '<span class="absent">none</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value):
        return f"{value:.3g}" if short and isinstance(value, float) else _number(value)
    text = str(value)
    if re.fullmatch(r"[0-9a-fA-F]{24,}", text):
        return f'<code title="{text}">{text[:12]}…</code>'
    return _text(_cut(text))


def _number(value: Any) -> str:
    """Whole numbers with separators, others with five digits."""
    if not _is_number(value):
        return _text(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 10000 else f"{value:.5g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 9.95 else format_duration(seconds)


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return {"license": "licence", "sha256": "SHA-256", "cpu": "CPU"}.get(words, words)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def _text(value: Any) -> str:
    """Text as HTML, also inside quoted attributes; control characters become visible."""
    return html.escape(_CONTROL.sub("\ufffd", str(value)), quote=True)


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and abs(value) <= 1e300  # also false for NaN


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
