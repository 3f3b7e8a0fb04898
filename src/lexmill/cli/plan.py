"""What `--plan` shows: the cost of training, as text or JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import typer

from lexmill.cli.options import console, print_json
from lexmill.devices import process_count, process_rank

_BILLION = 1e9


def planned_processes(asked: int | None) -> int | None:
    """How many processes to plan for: so many, else those that torchrun started; None in all of these but the first."""
    return None if process_rank() else asked or process_count()


def show_plans(forecasts: dict[str, Any], json: bool) -> None:
    """Print the forecast of each training step."""
    if json:
        print_json({step: dataclasses.asdict(one) | _totals(one) for step, one in forecasts.items()})
        return
    screen = console()
    for step, one in forecasts.items():
        if len(forecasts) > 1:
            typer.echo(f"\n{step}")
        for name, text in _lines(one):
            typer.echo(f"{name:<12} {text}")
        for warning in one.warnings:
            screen.print(f"warning: {warning}", style="bold yellow", markup=False)


def _totals(one: Any) -> dict[str, Any]:
    """Sums that the dataclasses compute."""
    kinds = {kind: getattr(one, kind) for kind in ("memory", "replicate", "shard")}
    return {f"{kind}_total": _needed(one, memory) for kind, memory in kinds.items() if memory is not None}


def _lines(one: Any) -> list[tuple[str, str]]:
    p = one.parameters
    lines = [
        (
            "parameters",
            f"{p.total:,}: {p.embeddings:,} in embeddings, {p.matrices:,} in matrices, "
            f"{p.total - p.embeddings - p.matrices:,} in norms and biases",
        ),
        *([("learning", f"{one.learning:,}: an adapter; the rest stays")] if one.learning != p.total else []),
        ("tokens", _tokens(one)),
        (
            "operations",
            f"{_flops(one.flops)} a token, {_flops(one.step_flops)} a step, {_flops(one.total_flops)} in all"
            + (f"; Muon {_flops(one.update_flops)} a step" if one.update_flops else ""),
        ),
        ("memory", _memory(one)),
    ]
    for kind in ("replicate", "shard"):
        if memory := getattr(one, kind):
            lines.append(
                ("", f'sharding = "{kind}": {_size(_needed(one, memory))} in each of {one.processes}')
            )
    lines.append(("disk", f"{_size(one.checkpoint)} a checkpoint, at most {_size(one.disk)} in all"))
    lines.append(("time", _time(one)))
    if one.time:
        lines.append(("speed", _speed(one)))
        if one.processes > 1:
            exchanged = 8 * one.learning * (one.processes - 1) / one.processes
            lines.append(
                (
                    "",
                    f"for {one.processes} processes, each alone on a machine or GPU like this one, without the "
                    f"exchange of {_size(exchanged)} of gradients a step",
                )
            )
    return lines


def _tokens(one: Any) -> str:
    text = f"{one.tokens_per_step:,} a step"
    if one.steps:
        text += f", {one.steps:,} steps, {one.tokens:,} in all"
    if one.data:
        about = "" if one.data.exact else "about "
        text += f"; {about}{one.data.tokens:,} in {one.data.documents:,} training documents"
        text += f": {one.epochs:,} epochs" if one.epochs is not None else ""
    return text


def _memory(one: Any) -> str:
    memory = one.memory
    parts = [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimiser", memory.optimizer),
        ("gathered layers", memory.gathered),
        (
            f"{'measured' if one.memory_measured else 'estimated'} for {one.rows_at_once} rows at once",
            memory.step,
        ),
    ]
    if one.device == "cpu":
        parts += [("program", memory.program), ("data", memory.data), ("checkpoint copy", memory.checkpoint)]
    said = ", ".join(f"{name} {_size(count)}" for name, count in parts if count)
    each = " in each process" if one.processes > 1 else ""
    return f"{_size(_needed(one, memory))}{each} of {_size(one.memory_available)} free ({said})"


def _needed(one: Any, memory: Any) -> int:
    return memory.total if one.device == "cpu" else memory.on_device


def _time(one: Any) -> str:
    time = one.time
    if time is None:
        return "not known: a calibration would not fit into memory"
    text = f"{_clock(time.seconds)}"
    if time.seconds_high > time.seconds_low:
        text += f" ({_clock(time.seconds_low)} to {_clock(time.seconds_high)})"
    if time.validation_seconds >= 1:
        text += f", and {_clock(time.validation_seconds)} of validation"
    steps, rows = _count(time.calibration_steps, "step"), _count(time.calibration_rows, "row")
    return f"{text}; h:mm:ss, from {steps} of {rows} just now"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _speed(one: Any) -> str:
    time = one.time
    return (
        f"{time.step_seconds:.3g} s a step, {time.tokens_per_second:,.0f} tokens/s in {one.precision}, "
        f"{100 * time.peak_share:.0f} % of the {time.peak_flops / _BILLION:,.0f} GFLOP/s of a matrix product here "
        f"({one.machine}, {_count(one.threads, 'thread')})"
    )


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count / 1e3:,.0f} kB"


def _flops(count: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count:,.0f} FLOP"
