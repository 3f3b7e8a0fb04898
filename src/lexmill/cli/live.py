"""What a terminal shows while work lasts: a bar, and below it, where a model trains, a panel with its figures.

It only draws what `Task.figures` was given. Drawing happens in rich's own thread, a few times a
second; a training step pays for one append to a list.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lexmill.devices import peak_memory, resident_memory
from lexmill.progress import Task, TerminalProgress, format_duration
from lexmill.train.watch import LossWatch

REDRAWN = 4  # times a second, at most
POINTS = 1000  # steps that the curve looks back
WIDEST = 96  # columns; a longer line is hard to read
NARROWEST = 28  # columns: with fewer there is the bar only
LOWEST = 8  # rows: with fewer there is the bar only

# The dots of a braille character, by row and column, as bits above U+2800.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


class LiveProgress(TerminalProgress):
    """A bar and, for training, its figures; erased when the task ends."""

    @contextlib.contextmanager
    def task(self, label: str, total: float | None = None, unit: str = "rows") -> Iterator[Task]:
        task = LiveTask(label, total, unit)
        with _Resizable(_View(task), self.console):
            yield task


class _Resizable(Live):
    """A live view that also finds its old lines when the terminal has become narrower and broken them."""

    def __init__(self, view: _View, console: Console) -> None:
        self._view = view
        super().__init__(
            console=console, refresh_per_second=REDRAWN, transient=True, get_renderable=self._next
        )

    def _next(self) -> _View:
        width, drawn = self.console.width, self._view.drawn
        if drawn and max(drawn) > width and getattr(self._live_render, "_shape", None):
            rows = sum(max(1, math.ceil(columns / width)) for columns in drawn)
            self._live_render._shape = (width, rows)  # rich goes up so many rows before it draws
        return self._view


class LiveTask(Task):
    """A task that keeps the last figures of its training."""

    def __init__(self, label: str, total: float | None, unit: str) -> None:
        super().__init__(label, total, unit)
        self.losses: deque[float] = deque(maxlen=POINTS)
        self.newest: dict[str, float] = {}
        self.best_validation: tuple[float, int] | None = None  # and the step where it was
        self._watch = LossWatch()

    def figures(self, line: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        self.newest |= numbers
        if math.isfinite(loss := numbers.get("loss", math.nan)):
            self.losses.append(loss)
            self._watch.is_spike(loss)
        validation = numbers.get("validation_loss", math.nan)
        if validation < (self.best_validation or (math.inf,))[0]:
            self.best_validation = (validation, int(line["step"]))

    @property
    def smooth(self) -> float:
        """The smoothed loss, spikes left out."""
        return self._watch.smooth


class _View:
    """A task as rich draws it, always for the terminal's present size."""

    def __init__(self, task: LiveTask) -> None:
        self._task = task
        self.drawn: list[int] = []  # columns of each line that stands on the terminal

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        task, width = self._task, min(options.max_width, WIDEST)
        height = console.height
        roomy = width >= NARROWEST and height >= LOWEST
        bar = bar_line(task, width, brief=bool(task.newest) and roomy)
        self.drawn = [Measurement.get(console, options, bar).maximum]
        yield bar
        if not task.newest or not roomy:
            return
        inside = width - 4
        body: list[Text] = []
        rows = 4 if height >= 18 else 2 if height >= 12 else 0
        if rows and len(task.losses) > 1 and not options.ascii_only:
            body = list(curve_lines(list(task.losses), inside, rows))
        body += flowed(training_figures(task), inside)
        body = body[: height - 4]
        self.drawn += [width] * (len(body) + 2)
        yield Panel(Group(*body), width=width, border_style="dim")


def bar_line(task: Task, width: int, brief: bool = False) -> Table:
    """The bar with what is done beside it, in one line.

    Args:
        brief: rate and time left stand elsewhere.
    """
    said = []
    if task.unit == "seconds":
        said.append(format_duration(task.done) + (f" of {format_duration(task.total)}" if task.total else ""))
    elif brief and task.total:
        said.append(f"{task.done:,.0f} of {task.total:,.0f} {task.unit}")
    if not brief:
        said += [f"{task.rate:,.0f} {task.unit}/s"] if task.unit != "seconds" else []
        said += [f"{format_duration(task.seconds_left)} left"] if task.seconds_left is not None else []
        said += [task.note] if task.note else []
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_column(width=24 if width >= 60 else max(width // 4, 4))
    grid.add_column(no_wrap=True, overflow="ellipsis")
    bar = ProgressBar(task.total, task.done, pulse=task.total is None)
    grid.add_row(task.label, bar, Text("  ".join(said)))
    return grid


def training_figures(task: LiveTask) -> list[Text]:
    """Name and value of each figure, in the order of what matters most."""
    newest = task.newest
    found = [("loss", f"{task.smooth:.4f}", "smoothed")]
    if "validation_loss" in newest and task.best_validation:
        best, step = task.best_validation
        found.append(("validation", f"{newest['validation_loss']:.4f}", f"best {best:.4f} at step {step:,}"))
    for name, value in newest.items():
        what = name.removeprefix("validation_")
        if what == name or what.endswith("loss"):
            continue
        if what.endswith("_accuracy"):
            found.append((f"{what.removesuffix('_accuracy')} right", f"{100 * value:.1f} %", ""))
        else:
            found.append((what.replace("_", " "), f"{value:.4g}", ""))
    rate = newest.get("tokens_per_second")
    found += [("tokens/s", f"{rate:,.0f}", "")] if rate is not None else []
    for name, label in (("learning_rate_factor", "learning rate ×"), ("gradient_norm", "gradient norm")):
        if name in newest:
            found.append((label, f"{newest[name]:.3g}", ""))
    if task.seconds_left is not None:
        found.append(("left", format_duration(task.seconds_left), ""))
    if held := resident_memory() or peak_memory():
        found.append(("memory", f"{held / 1e6:,.0f} MB", ""))
    return [
        Text.assemble((f"{name} ", "dim"), (value, "bold"), (f" {more}" if more else "", "dim"))
        for name, value, more in found
    ]


def flowed(items: Sequence[Text], width: int) -> list[Text]:
    """The items one after another in lines of at most `width` columns; none is broken, one too long is cut."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + 3 + item.cell_len <= width:
            lines[-1] = lines[-1] + Text("   ") + item
        else:
            lines.append(item.copy())
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


def curve_lines(losses: Sequence[float], width: int, rows: int) -> Iterator[Text]:
    """The losses as a curve of `rows` lines, with its highest and lowest place named at the left."""
    edge = max(cell_len(f"{max(losses):.2f}"), 4) + 1
    values = resampled(losses, 2 * (width - edge))
    high, low = max(values), min(values)
    for row, dots in enumerate(braille(values, rows)):
        name = f"{high:.2f}" if row == 0 else f"{low:.2f}" if row == rows - 1 else ""
        yield Text.assemble((f"{name:>{edge - 1}} ", "dim"), (dots, "cyan"), no_wrap=True)


def resampled(values: Sequence[float], count: int) -> list[float]:
    """`count` values for any number of them: means where there are more, straight lines where there are fewer."""
    if len(values) >= count:
        edges = [place * len(values) // count for place in range(count + 1)]
        return [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    found = []
    for place in range(count):
        at = place * (len(values) - 1) / max(count - 1, 1)
        left = min(int(at), len(values) - 2)
        found.append(values[left] + (at - left) * (values[left + 1] - values[left]))
    return found


def braille(values: Sequence[float], rows: int) -> list[str]:
    """A line through `values`, two a character and four dots a row, as `rows` strings."""
    low, high = min(values), max(values)
    top = 4 * rows - 1
    places = [round((high - value) / ((high - low) or 1) * top) for value in values]
    cells = [[0] * ((len(values) + 1) // 2) for _ in range(rows)]
    before = places[0]
    for column, place in enumerate(places):
        # each column reaches up or down to its neighbour, so that a steep line has no holes
        first, last = (before + 1, place) if before < place else (place, max(before - 1, place))
        for dot in range(first, last + 1):
            cells[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
        before = place
    return ["".join(chr(0x2800 + bits) for bits in line) for line in cells]
