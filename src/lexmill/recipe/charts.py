"""The curves of a report as data for uPlot: thinned, smoothed, captioned."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from lexmill.recipe import markup
from lexmill.recipe.report_data import Stage

MOST_POINTS = 1500  # of a curve; more are thinned out


def chart_figure(name: str, label: str, caption: str) -> str:
    return (
        f'<figure><div data-chart="{name}" role="img" aria-label="{markup.escaped(label)}. {markup.escaped(caption)}"></div>'
        f"<figcaption>{markup.escaped(caption)}</figcaption></figure>"
    )


def loss_chart(stage: Stage) -> dict[str, Any] | None:
    loss, validation = stage.series("loss"), stage.series("validation_loss")
    curves: dict[str, tuple[str, dict[int, float]]] = {}
    if loss:
        curves["training"] = ("faint", thinned(loss))
        curves["training, smoothed"] = ("line", thinned(smoothed(loss)))
    if validation:
        curves["validation"] = ("points", thinned(validation))
    return chart_data("loss (nats per token)", curves, digits=4) if curves else None


def loss_caption(stage: Stage) -> str:
    loss, validation = stage.series("loss"), stage.series("validation_loss")
    said = []
    if loss:
        first, last = next(iter(loss.values())), list(smoothed(loss).values())[-1]
        steps = f"{max(loss):,} step" + ("s" if max(loss) != 1 else "")
        said.append(f"Training loss {first:.3f} at first, {last:.3f} (smoothed) after {steps}.")
    if validation:
        best = min(validation, key=lambda step: validation[step])
        last_step = list(validation)[-1]
        said.append(f"Validation loss {validation[last_step]:.3f} in the end")
        said[-1] += "." if best == last_step else f", {validation[best]:.3f} at best (step {best:,})."
    return " ".join(said)


def chart_data(
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
            {"label": name, "look": look, "values": [rounded_off(values.get(step)) for step in steps]}
            for name, (look, values) in curves.items()
        ],
    }


def rounded_off(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def smoothed(values: Mapping[int, float]) -> dict[int, float]:
    """The mean over a thirtieth of the curve around each step, so that the line does not lag behind."""
    half = len(values) // 60
    sums = [0.0, *itertools.accumulate(values.values())]
    means = {}
    for place, step in enumerate(values):
        low, high = max(0, place - half), min(len(values), place + half + 1)
        means[step] = (sums[high] - sums[low]) / (high - low)
    return means


def thinned(values: Mapping[int, float]) -> dict[int, float]:
    """At most `MOST_POINTS` of them, evenly chosen; the first and the last stay."""
    steps = list(values)
    if len(steps) > MOST_POINTS:
        last = len(steps) - 1
        steps = [steps[round(place * last / (MOST_POINTS - 1))] for place in range(MOST_POINTS)]
    return {step: values[step] for step in steps}
