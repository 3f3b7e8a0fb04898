"""How long work tells what it does: a live bar on a terminal, plain lines in a pipe, or nothing.

Functions of the Python API take a `Progress` and are silent by default; the command line hands
in one that fits where its output goes.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any


def format_duration(seconds: float) -> str:
    """`75` becomes `1m15s`; hours appear when there are any."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Task:
    """One piece of work with a known or unknown length. `advance` is cheap enough for inner loops."""

    def __init__(self, label: str, total: float | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.note = ""
        self.started = time.perf_counter()

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Count `amount` units as done; `note` replaces the text behind the bar."""
        self.done += amount
        if note is not None:
            self.note = note

    def figures(self, line: Mapping[str, Any]) -> None:
        """Take what was measured at a step ("step" and figures by name), for a view that shows it; others don't."""

    @property
    def rate(self) -> float:
        """Units a second since the task began."""
        return self.done / max(time.perf_counter() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at the present rate; None when that cannot be known."""
        if self.total is None or self.done <= 0:
            return None
        return max(self.total - self.done, 0) / self.rate


class Progress:
    """Says nothing. The base of the two that do, and the default everywhere."""

    def say(self, text: str) -> None:
        """Print one line of news."""

    @contextlib.contextmanager
    def task(self, label: str, total: float | None = None, unit: str = "rows") -> Iterator[Task]:
        """Show a task while the block runs.

        Args:
            label: what is being done, a few words.
            total: how many units make the whole, or None when unknown.
            unit: the plural name of a unit, shown with the rate.
        """
        yield Task(label, total, unit)


SILENT = Progress()


class _ReportingTask(Task):
    """Calls `show` at most every `interval` seconds."""

    def __init__(
        self, label: str, total: float | None, unit: str, interval: float, show: Callable[[Task], None]
    ) -> None:
        super().__init__(label, total, unit)
        self._interval, self._show = interval, show
        self._next = self.started + interval

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        super().advance(amount, note)
        now = time.perf_counter()
        if now >= self._next:
            self._next = now + self._interval
            self._show(self)


class PlainProgress(Progress):
    """Plain lines, for pipes and log files: one every `interval` seconds and one at the end."""

    def __init__(self, stream: IO[str] | None = None, interval: float = 5.0) -> None:
        self.stream = stream or sys.stderr
        self.interval = interval

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    @contextlib.contextmanager
    def task(self, label: str, total: float | None = None, unit: str = "rows") -> Iterator[Task]:
        task = _ReportingTask(label, total, unit, self.interval, self._show)
        yield task
        took = time.perf_counter() - task.started
        if took >= 2:
            self.say(f"{label}: {task.done:,.0f} {unit} in {format_duration(took)}  {task.note}".rstrip())

    def _show(self, task: Task) -> None:
        share = f" {100 * task.done / task.total:.0f} %" if task.total else ""
        left = task.seconds_left
        time_left = f", {format_duration(left)} left" if left is not None else ""
        self.say(
            f"{task.label}:{share} {task.done:,.0f} {task.unit}, {task.rate:,.0f}/s{time_left}  {task.note}".rstrip()
        )


class TerminalProgress(Progress):
    """A live bar (rich) with rate and time left, erased when its task ends."""

    def __init__(self, console: Any) -> None:
        self.console = console

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    @contextlib.contextmanager
    def task(self, label: str, total: float | None = None, unit: str = "rows") -> Iterator[Task]:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            transient=True,
        )
        row = bar.add_task(label, total=total, figures="")

        def show(task: Task) -> None:
            left = task.seconds_left
            parts = [f"{task.rate:,.0f} {task.unit}/s"]
            if left is not None:
                parts.append(f"{format_duration(left)} left")
            if task.note:
                parts.append(task.note)
            bar.update(row, completed=task.done, figures="  ".join(parts))

        with bar:
            yield _ReportingTask(label, total, unit, 0.1, show)
