"""Hands a run's figures on to TensorBoard, Weights & Biases or trackio. `metrics.jsonl` is written without it.

A tracker only listens: one that fails is named once and switched off, and training goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from lexmill.errors import LexmillError, MissingPackageError
from lexmill.files import read_json, write_json
from lexmill.progress import SILENT, Progress

TrackerName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "lexmill"
IDENTITY = (
    "tracking.json"  # in a run's folder: by which name services know it, so that a resume goes on there
)


class Tracker(Protocol):
    """What every tracker can do. Any exception of it is taken as a failure and switches it off."""

    def open(self, name: str, config: Mapping[str, Any]) -> str:
        """Begin, or go on with, the run of this name; where to look at it, in words.

        Args:
            config: what the run was told, as nested tables of plain values.
        """

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take figures of a step. A step may be told in several parts."""

    def close(self) -> None:
        """Hand on what is still held back."""


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder, written by torch.utils.tensorboard."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._step = folder / "tensorboard", step

    def open(self, name: str, config: Mapping[str, Any]) -> str:
        import json

        from torch.utils.tensorboard import SummaryWriter

        # events of steps that will be done again do not count any more
        self._writer = SummaryWriter(str(self._folder), purge_step=self._step + 1, flush_secs=10)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        self._writer.add_text(
            "settings", "\n".join(f"    {line}" for line in text.splitlines()), self._step + 1
        )
        return f"tensorboard --logdir {self._folder}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; its own environment (WANDB_PROJECT, WANDB_MODE ...) decides the rest."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder

    def open(self, name: str, config: Mapping[str, Any]) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=re.sub(r"[^\w-]", "-", name),
            resume="allow",
            dir=str(self._folder),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        # By our own step: wandb's may not go back, but a resume does some steps again, with the same figures.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return f"wandb sync {self._run.dir}" if self._run.offline else str(self._run.url)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio; its own environment (TRACKIO_DIR, TRACKIO_SPACE_ID ...) decides the rest."""

    def __init__(self, folder: Path, step: int) -> None:
        pass

    def open(self, name: str, config: Mapping[str, Any]) -> str:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # it greets at length
            self._run = trackio.init(project, name=name, resume="allow", config=dict(config), embed=False)
        return f"trackio show --project {project}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        import trackio

        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            trackio.finish()  # the run's own `finish` would be called once more as Python ends, with a word on it


_TRACKERS: dict[TrackerName, type[TensorBoard] | type[WandB] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Look for the packages of these trackers, without importing them.

    Raises:
        MissingPackageError: one is not installed; says which extra has it.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: a folder that happens to have this name
            raise MissingPackageError(name, f"for track = [{name!r}]", name)


class Trackers:
    """Several trackers as one listener of a run's metrics."""

    def __init__(self, trackers: Mapping[str, Tracker], progress: Progress = SILENT) -> None:
        self._trackers = dict(trackers)
        self._progress = progress

    def open(self, name: str, config: Mapping[str, Any]) -> None:
        """Open all of them, and say where each can be looked at."""
        for kind, tracker in list(self._trackers.items()):
            with self._switched_off_on_failure(kind):
                self._progress.say(f"  {kind}: {tracker.open(name, config)}")

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand on a line of `metrics.jsonl`: its numbers, under the names that trackers group them by."""
        if not self._trackers:
            return
        numbers = {name: float(value) for name, value in line.items() if isinstance(value, (int, float))}
        validation = {name: value for name, value in numbers.items() if name.startswith("validation_")}
        # a line of validation repeats tokens and seconds of its step's own line
        figures = {grouped(name): value for name, value in (validation or numbers).items() if name != "step"}
        for kind, tracker in list(self._trackers.items()):
            with self._switched_off_on_failure(kind):
                tracker.log(line["step"], figures)

    def close(self) -> None:
        """Close all that are left."""
        for kind, tracker in list(self._trackers.items()):
            with self._switched_off_on_failure(kind):
                tracker.close()

    @contextlib.contextmanager
    def _switched_off_on_failure(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, training is worth more
            self._trackers.pop(kind, None)
            said = str(error).strip() or type(error).__name__
            self._progress.say(
                f"  {kind} failed and is switched off; training goes on: {said.splitlines()[0]}"
            )


def grouped(name: str) -> str:
    """`validation_loss` becomes `validation/loss`, `loss` becomes `training/loss`."""
    kind, _, rest = name.partition("_")
    return f"validation/{rest}" if kind == "validation" and rest else f"training/{name}"


@contextlib.contextmanager
def tracking(
    names: Sequence[TrackerName],
    folder: Path,
    step: int,
    facts: Mapping[str, Any],
    progress: Progress = SILENT,
) -> Iterator[Trackers]:
    """Open trackers while the block runs.

    Args:
        names: which; none is fine.
        folder: the run's folder, where its identity is remembered.
        step: the last step that is done already; 0 begins a new run.
        facts: what is told of the run: "stage", and whatever else describes it.
    """
    trackers = Trackers({name: _TRACKERS[name](folder, step) for name in dict.fromkeys(names)}, progress)
    if names:
        trackers.open(_identity(folder, step, str(facts.get("stage", "training"))), facts)
    try:
        yield trackers
    finally:
        trackers.close()


def _identity(folder: Path, step: int, stage: str) -> str:
    """The name of the run: of its folder, its stage, and an id that only a resume takes over."""
    path = folder / IDENTITY
    if step:
        with contextlib.suppress(LexmillError, KeyError, TypeError):
            return str(read_json(path)["name"])
    parts = folder.absolute().parts
    # a step of a recipe works in RUN/.work/STEP/STEP and has the name of the run
    home = parts[parts.index(".work") - 1] if ".work" in parts else parts[-1]
    name = f"{home} {stage} {secrets.token_hex(3)}"
    write_json(path, {"name": name})
    return name
