"""The live view of the terminal: fits every size, ends clean, and silence stays silent."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text
from test_train import SHAPE, config
from test_train import documents as examples

from lexmill.cli.live import LiveProgress, LiveTask, _View, braille, flowed, resampled
from lexmill.model.decoder import Decoder
from lexmill.progress import SILENT, PlainProgress, Progress, Task
from lexmill.train.batches import Loader
from lexmill.train.causal import causal_loss
from lexmill.train.loop import Hooks, train


def trained(steps: int = 300) -> LiveTask:
    task = LiveTask("pretraining", 1000, "steps")
    for step in range(1, steps + 1):
        figures = {"loss": 3 + 4 / step, "learning_rate_factor": 1.0, "gradient_norm": 0.8}
        task.figures({"step": step, **figures, "tokens_per_second": 5400, "documents": [1]})
        task.advance()
    for step, loss in ((100, 3.2), (200, 3.1), (300, 3.15)):
        task.figures({"step": step, "validation_loss": loss, "validation_tokens_accuracy": 0.33})
    return task


def drawn(task: LiveTask, width: int, height: int, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None)
    console.print(_View(task))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def test_the_panel_tells_what_matters():
    text = drawn(trained(), 100, 30)
    for said in (
        "pretraining",
        "300 of 1,000 steps",
        "loss 3.01",
        "validation 3.1500 best 3.1000 at step 200",
        "tokens right 33.0 %",
        "tokens/s 5,400",
        "learning rate × 1",
        "gradient norm 0.8",
        "left ",
        "memory ",
    ):
        assert said in text, said
    assert any(0x2800 < ord(letter) < 0x2900 for letter in text)


@pytest.mark.parametrize("width", [1, 5, 20, 28, 33, 50, 79, 96, 200])
@pytest.mark.parametrize("height", [1, 7, 8, 12, 18, 50])
@pytest.mark.parametrize("steps", [0, 1, 2, 300])
def test_it_fits_a_terminal_of_any_size(width, height, steps):
    lines = drawn(trained(steps), width, height).splitlines()
    assert all(len(line) <= max(width, 8) for line in lines)
    assert len(lines) <= max(height, 2)


def test_a_terminal_without_braille_gets_the_figures_alone():
    text = drawn(trained(), 100, 30, encoding="ascii")
    assert "tokens/s 5,400" in text and "????" not in text


def test_work_without_figures_has_a_bar_only():
    task = LiveTask("preparing", 10, "MB")
    task.advance(5, "so far")
    text = drawn(task, 100, 30)
    assert "preparing" in text and "so far" in text and len(text.splitlines()) == 1


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=300),
    count=st.integers(2, 120),
    rows=st.integers(1, 6),
)
def test_curves_keep_their_size_and_stay_within_their_values(values, count, rows):
    found = resampled(values, count)
    assert len(found) == count
    slack = 1e-6 * (1 + max(map(abs, values)))
    assert min(values) - slack <= min(found) and max(found) <= max(values) + slack
    lines = braille(found, rows)
    assert len(lines) == rows and {len(line) for line in lines} == {(count + 1) // 2}
    for column in range(count):  # every column has a dot, so the line has no holes
        half = 0x47 if column % 2 == 0 else 0xB8
        assert any((ord(line[column // 2]) - 0x2800) & half for line in lines)


def test_a_falling_line_falls():
    assert braille([3, 2, 1, 0], 1) == ["⠑⢄"]


def test_items_flow_and_are_never_wider_than_the_line():
    lines = flowed([Text("a" * 10), Text("b" * 10), Text("c" * 40)], 24)
    assert [line.cell_len for line in lines] == [23, 24]


def test_it_is_erased_and_the_cursor_is_back_also_after_ctrl_c():
    file = io.StringIO()
    progress = LiveProgress(Console(file=file, width=80, height=24, force_terminal=True))
    with pytest.raises(KeyboardInterrupt), progress.task("pretraining", 10, "steps") as task:
        task.figures({"step": 1, "loss": 3.0})
        progress.say("a line of news")
        raise KeyboardInterrupt
    assert "a line of news" in file.getvalue()
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
    assert file.getvalue().endswith("\x1b[2K")  # the last line that stood there is cleared


class Listening(Progress):
    """Hands out one task that remembers its figures."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def task(self, label, total=None, unit="rows"):
        import contextlib

        task = Task(label, total, unit)
        task.figures = lambda line: self.lines.append(dict(line))
        return contextlib.nullcontext(task)


def test_the_loop_hands_over_every_line_of_its_metrics(tmp_path):
    from lexmill.train.metrics import read_metrics

    listening = Listening()
    loader = Loader(lambda epoch: examples([20, 31, 7], epoch), rows=2, length=32, pad_id=0, seed=0)
    decoder = Decoder(SHAPE)
    decoder.initialise(0)
    hooks = Hooks(validate=lambda model: {"validation_loss": 4.0})
    train(decoder, causal_loss, loader, config(steps=6), tmp_path, hooks=hooks, progress=listening)
    assert listening.lines == list(read_metrics(tmp_path / "metrics.jsonl"))
    assert sum("loss" in line for line in listening.lines) == 6


def test_pipes_and_silence_are_as_they_were(capsys):
    stream = io.StringIO()
    for progress in (PlainProgress(stream, interval=0.0), SILENT):
        with progress.task("training", 2, "steps") as task:
            task.figures({"step": 1, "loss": 3.0})
            task.advance(1, "loss 3.000")
    assert len(stream.getvalue().splitlines()) == 1
    assert stream.getvalue().startswith("training: 50 % 1 steps")
    assert capsys.readouterr() == ("", "")
