"""Trackers: TensorBoard read back with its own reader, failures that do not stop training, resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import run_training as train_tiny_model

from lexmill.config import from_mapping
from lexmill.errors import ConfigError, MissingPackageError
from lexmill.progress import Progress
from lexmill.train import trackers
from lexmill.train.config import TrainConfig
from lexmill.train.loop import Hooks
from lexmill.train.metrics import read_metrics
from lexmill.train.trackers import Trackers, grouped, tracking


class Heard(Progress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def run_training(folder: Path, stop_after: int | None = None, **changes):
    hooks = Hooks(validate=lambda model: {"validation_loss": 4.5, "validation_tokens_accuracy": 0.25})
    return train_tiny_model(folder, stop_after, hooks, **changes)[1]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself finds in event files: name to step to value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    for name in found.Tags()["scalars"]:
        steps = [event.step for event in found.Scalars(name)]
        assert len(steps) == len(set(steps)), f"{name}: a step is there twice"
    return {
        name: {event.step: event.value for event in found.Scalars(name)} for name in found.Tags()["scalars"]
    }


def test_tensorboard_reads_every_figure_of_a_run_that_was_killed_and_went_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        run_training(tmp_path, stop_after=13, track=("tensorboard",))
    heard = Heard()
    run_training(tmp_path, progress=heard, track=("tensorboard",))
    assert any(line.startswith("going on from step") for line in heard.lines)
    found = scalars(tmp_path / "tensorboard")
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert found["training/loss"] == pytest.approx(losses, abs=1e-5) and len(losses) == 24
    assert set(found["validation/loss"]) == {5, 10, 15, 20, 24}
    assert {"training/gradient_norm", "training/tokens_per_second", "validation/tokens_accuracy"} <= set(
        found
    )


def test_a_run_that_begins_again_forgets_the_events_of_the_one_before(tmp_path: Path) -> None:
    for steps in (8, 3):
        with tracking(("tensorboard",), tmp_path, 0, {"stage": "x"}) as opened:
            for step in range(1, steps + 1):
                opened.log({"step": step, "loss": float(steps)})
    assert scalars(tmp_path / "tensorboard")["training/loss"] == {1: 3.0, 2: 3.0, 3: 3.0}


def test_weights_do_not_depend_on_who_watches(tmp_path: Path) -> None:
    first = run_training(tmp_path / "a").loss
    assert run_training(tmp_path / "b", track=("tensorboard",)).loss == first
    assert not (tmp_path / "a" / "tracking.json").exists()


class Broken:
    """Fails where it is told to."""

    def __init__(self, where: str, step: int = 3) -> None:
        self.where, self.step, self.logged = where, step, []

    def open(self, name, config):
        if self.where == "open":
            raise OSError("no network\nand more")
        return "here"

    def log(self, step, figures):
        if self.where == "log" and step >= self.step:
            raise ValueError("cannot")
        self.logged.append(step)

    def close(self):
        if self.where == "close":
            raise RuntimeError


@pytest.mark.parametrize(
    "where, said", [("open", "no network"), ("log", "cannot"), ("close", "RuntimeError")]
)
def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(where: str, said: str) -> None:
    heard, good = Heard(), Broken("nowhere")
    both = Trackers({"bad": Broken(where), "good": good}, heard)
    both.open("name", {})
    for step in range(1, 10):
        both.log({"step": step, "loss": 1.0})
    both.close()
    assert good.logged == list(range(1, 10))
    (line,) = [line for line in heard.lines if "bad failed" in line]
    assert "switched off; training goes on" in line and said in line and "and more" not in line


def test_training_outlives_its_tracker(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(trackers._TRACKERS, "tensorboard", lambda folder, step: Broken("log", 5))
    heard = Heard()
    assert run_training(tmp_path, progress=heard, track=("tensorboard",)).steps == 24
    assert len([line for line in heard.lines if "tensorboard failed" in line]) == 1


def test_only_numbers_are_handed_on() -> None:
    told = []
    one = Broken("nowhere")
    one.log = lambda step, figures: told.append((step, figures))
    Trackers({"one": one}).log({"step": 4, "spike": 9, "documents": [1], "loss": 2.5, "words": "x"})
    assert told == [(4, {"training/spike": 9.0, "training/loss": 2.5})]
    assert grouped("validation_pairs_accuracy") == "validation/pairs_accuracy"


def test_a_missing_package_is_said_with_its_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"wandb.*lexmill\[wandb\]"):
        TrainConfig(steps=1, track=("wandb",))


def test_a_folder_of_the_package_s_name_is_not_the_package(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(MissingPackageError):
        TrainConfig(steps=1, track=("trackio",))


def test_an_unknown_tracker_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="tensorboard"):
        from_mapping(TrainConfig, {"steps": 1, "track": ["tensorbord"]}, "pretrain")


def test_a_run_keeps_its_name_on_a_resume_and_only_then(tmp_path: Path) -> None:
    work = tmp_path / "quick" / ".work" / "pretrain" / "pretrain"
    names = [trackers._identity(work, step, "pretraining") for step in (0, 20, 0)]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("quick pretraining ")


PROGRAM = """
import sys
from pathlib import Path
from lexmill.train.trackers import tracking
for first in (0, 2):
    with tracking((sys.argv[1],), Path(sys.argv[2]), first, {"stage": "pretraining", "settings": {"rows": 2}}) as opened:
        for step in range(first + 1, 5):
            opened.log({"step": step, "loss": 5.0 - step})
        opened.log({"step": 4, "validation_loss": float("nan")})
        assert opened._trackers, "switched off"
"""


def run_program(name: str, folder: Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, str(folder)],
        env={**os.environ, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_wandb_writes_a_run_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_program("wandb", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    identity = json.loads((tmp_path / "tracking.json").read_text())["name"].replace(" ", "-")
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert files and b"training/loss" in files[0].read_bytes()


def test_trackio_writes_a_run_and_goes_on_with_it(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    import sqlite3

    run_program("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    (database,) = (tmp_path / "trackio").glob("*.db")
    rows = list(sqlite3.connect(database).execute("select run_id, step, metrics from metrics"))
    assert len({run for run, _, _ in rows}) == 1
    losses = {step: json.loads(text).get("training/loss") for _, step, text in rows if b"training" in bytes(text)}  # fmt: skip
    assert losses == {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}
