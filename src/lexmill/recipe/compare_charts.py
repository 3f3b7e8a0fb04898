"""The curves of several runs as data for compare.js: one table a training, its rows thinned and rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lexmill.errors import LexmillError
from lexmill.recipe.charts import rounded_off, smoothed, thinned
from lexmill.recipe.compare_data import STAGES, ComparedRun, Training
from lexmill.recipe.markup import as_words

AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training"}
MOST_MARKS = 60  # of a run, drawn on its curve; the table below has more
_NAMED_DOCUMENTS = 6
_LARGEST_READ = 200_000_000  # bytes of documents that are searched for names

# What is drawn of each training: the figure, the label of the axis, digits, whether the axis begins at 0,
# whether its line is smoothed, and whether the figures themselves are drawn lightly behind it.
_CURVES = {
    "loss": ("training loss (nats per token)", 4, False, True, True),
    "validation_loss": ("validation loss (nats per token)", 4, False, False, False),
    "tokens_per_second": ("tokens per second", 0, True, True, False),
    "gradient_norm": ("gradient norm", 3, True, True, False),
    "learning_rate_factor": ("learning rate, as part of its highest", 3, True, False, False),
}


def comparison_charts(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """What compare.js draws.

    Returns:
        "runs": their names. "axes": name to label. "tables": stage to a list with a table a run
        (None where a run has no such stage). "charts": which figures are drawn, in order.
    """
    return {
        "runs": [run.name for run in runs],
        "axes": AXES,
        "tables": {stage: [_table(run, stage) for run in runs] for stage in STAGES},
        "charts": [
            {"name": f"{stage}-{key}", "stage": stage, "key": key, **_look(key)}
            for stage in STAGES
            for key in charted(runs, stage)
        ],
    }


def charted(runs: Sequence[ComparedRun], stage: str) -> list[str]:
    """The figures of a stage that at least one run has."""
    trainings = [run.trainings[stage] for run in runs if stage in run.trainings]
    accuracies = dict.fromkeys(name for training in trainings for name in training.accuracies)
    keys = ["loss", "validation_loss", *accuracies, "tokens_per_second", "gradient_norm", "learning_rate_factor"]  # fmt: skip
    return [key for key in keys if any(training.series(key) for training in trainings)]


def chart_title(key: str) -> str:
    """What a chart shows, in words."""
    return _CURVES[key][0] if key in _CURVES else f"{as_words(key.removesuffix('_accuracy'))}: right first guesses"  # fmt: skip


def _look(key: str) -> dict[str, Any]:
    _, digits, from_zero, smooth, raw = _CURVES.get(key, ("", 4, False, False, False))
    return {
        "label": chart_title(key),
        "digits": digits,
        "from_zero": from_zero,
        "smooth": smooth,
        "raw": raw,
        "points": key.startswith("validation_"),
    }


def _table(run: ComparedRun, stage: str) -> dict[str, Any] | None:
    """The columns of a training by figure: [steps, tokens, seconds, values, smoothed values or None]."""
    training = run.trainings.get(stage)
    if training is None:
        return None
    tokens, seconds = training.series("tokens"), training.series("seconds")
    columns = {}
    for key in charted([run], stage):
        values = training.series(key)
        means = _means(training, key) if _look(key)["smooth"] else None
        steps = [step for step in thinned(values) if step in tokens and step in seconds]
        columns[key] = [
            steps,
            [tokens[step] for step in steps],
            [rounded_off(seconds[step]) for step in steps],
            [rounded_off(values[step]) for step in steps],
            [rounded_off(means.get(step)) for step in steps] if means else None,
        ]
    return {"columns": columns, "marks": _marks(run, training)}


def _means(training: Training, key: str) -> dict[int, float]:
    """A smoothed figure; losses that jumped are left out, since one of them would lift a whole stretch."""
    values = training.series(key)
    jumped = {mark["step"] for mark in training.marks()} if key == "loss" else set()
    return smoothed({step: value for step, value in values.items() if step not in jumped})


def _marks(run: ComparedRun, training: Training) -> list[dict[str, Any]]:
    """Where each mark stands on the smoothed curve, and what it says."""
    means = _means(training, "loss")
    tokens, seconds = training.series("tokens"), training.series("seconds")
    found = []
    for mark in described_marks(run, training)[:MOST_MARKS]:
        near = [step for step in means if step <= mark["step"] and step in tokens and step in seconds]
        if near:
            place = near[-1]
            found.append(
                {
                    "kind": mark["kind"],
                    "text": f"{run.name}, step {mark['step']:,}: {mark['said']}",
                    "at": [mark["step"], tokens.get(mark["step"], tokens[place]), seconds[place]],
                    "y": rounded_off(means[place]),
                }
            )
    return found


def described_marks(run: ComparedRun, training: Training) -> list[dict[str, Any]]:
    """The spikes and skipped steps of a training; "said" tells each with its documents."""
    marks = list(training.marks())
    wanted = {number for mark in marks for number in mark["documents"][:_NAMED_DOCUMENTS]}
    names = _document_names(run.path, wanted) if training.name == "pretrain" and wanted else {}
    for mark in marks:
        what = "step skipped: its loss or gradient was no finite number"
        if mark["kind"] == "spike":
            what = "the loss jumped" + (f" to {mark['loss']:.3f}" if mark["loss"] is not None else "")
        numbers = mark["documents"]
        if numbers:
            shown = ", ".join(names.get(one, f"no. {one:,}") for one in numbers[:_NAMED_DOCUMENTS])
            more = len(numbers) - _NAMED_DOCUMENTS
            what += f"; documents: {shown}" + (f" and {more:,} more" if more > 0 else "")
        mark["said"] = what
    return marks


def _document_names(run: Path, wanted: set[int]) -> Mapping[int, str]:
    """Where the training texts with these numbers come from; empty where the run does not hold them."""
    path = run / "prepare" / "train.parquet"
    with contextlib.suppress(LexmillError, OSError):
        if path.is_file() and path.stat().st_size <= _LARGEST_READ:
            from lexmill.data.documents import find_texts

            return {
                number: "/".join(document.source.split("/")[-2:]) or document.id
                for number, document in find_texts(path, wanted).items()
            }
    return {}
