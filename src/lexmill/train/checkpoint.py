"""Checkpoints that hold everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lexmill.errors import LexmillError
from lexmill.files import atomic_directory, read_json, remove_partials, sha256_file, write_json
from lexmill.formats.safetensors import SafetensorsFile
from lexmill.formats.safetensors_writing import write_safetensors
from lexmill.model.spreading import placed_like, whole
from lexmill.progress import SILENT, Progress
from lexmill.train.optimizers import OptimizerSet
from lexmill.train.processes import Processes

_FILES = ("model.safetensors", "optimizer.safetensors")
_STATE = "state.json"
_SHARDS = "shards"  # of a model that is spread over processes
_BEST = "best"


@dataclass
class Position:
    """How far a run has come: all of it that is not in the tensors."""

    step: int = 0
    total_steps: int = 0  # 0 while a budget in minutes is not yet turned into steps
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    precision: str = ""  # chosen by a probe at the start; another choice would be another run
    loader: dict[str, Any] | None = None
    best: float | None = None  # the best figure of a validation, where the best weights are kept
    best_step: int = 0
    stale: int = 0  # validations since then
    stopped: bool = False  # early, because there were too many of those


class Checkpoints:
    """The checkpoints of one run: `step-NNNNNNNN`, the newest few of them, and `best`.

    Writing goes on beside training: `save` copies the state in memory and returns. A checkpoint
    appears whole or not at all, and one that was damaged later is noticed by its hashes.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizers: OptimizerSet,
        *,
        keep_last: int = 2,
        processes: Processes | None = None,
        sharded: bool = False,
        progress: Progress = SILENT,
    ) -> None:
        self._folder, self._model, self._optimizers = folder, model, optimizers
        self._keep_last, self._processes, self._sharded = keep_last, processes or Processes(), sharded
        self._progress = progress
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        """However training ends, nothing is still being written."""
        if self._writer is not None:
            self._writer.join()

    @property
    def busy(self) -> bool:
        """Whether an earlier one is still being written."""
        return self._writer is not None and self._writer.is_alive()

    def save(self, position: Position) -> None:
        """Write `step-NNNNNNNN`, then drop all but the newest.

        Raises:
            FileError: this one, or the one before, could not be written.
        """
        target = self._folder / f"step-{position.step:08d}"
        if self._sharded:
            self._save_shards(target, position)
        elif self._processes.first:
            arrays = (
                self._weights(),
                {name: array.copy() for name, array in self._optimizers.state().items()},
            )
            self._in_background(lambda: self._write(target, arrays, {**vars(position)}))

    def save_best(self, position: Position) -> None:
        """Write the weights alone to `best`."""
        weights = self._weights()
        if self._processes.first:
            facts = {"step": position.step, "best": position.best}
            self._in_background(lambda: self._write(self._folder / _BEST, (weights,), facts))

    def wait(self) -> None:
        """Until what is being written stands.

        Raises:
            FileError: it could not be written.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def load(self) -> Position | None:
        """Take up the newest whole checkpoint; a damaged one is named and the one before it is taken.

        Returns:
            Where the run stood, or None when there is no checkpoint.
        """
        if self._processes.first and self._folder.is_dir():
            remove_partials(self._folder)
        self._processes.wait()
        for path in reversed(self._steps()):
            try:
                position = self._read(path)
            except (LexmillError, KeyError, TypeError, AttributeError, ValueError) as error:
                self._progress.say(f"Checkpoint {path.name} cannot be used ({error}); trying the one before.")
                continue
            return position
        return None

    def load_best(self) -> None:
        """Put the best weights back into the model."""
        self.wait()
        self._processes.wait()
        folder = self._folder / _BEST
        _checked_state(folder)
        self._take_weights(_arrays(folder / _FILES[0]))

    def remove(self) -> None:
        """All of them: the run is over."""
        self.wait()
        self._processes.wait()
        if self._processes.first:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _in_background(self, work: Callable[[], None]) -> None:
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised again by `wait`
                self._failure = error

        # not a daemon: a program that ends while a checkpoint is written waits for it
        self._writer = threading.Thread(target=run, name="checkpoint")
        self._writer.start()

    def _write(self, target: Path, arrays: tuple[dict[str, np.ndarray], ...], facts: dict[str, Any]) -> None:
        with atomic_directory(target) as partial:
            names = _FILES[: len(arrays)]
            for name, part in zip(names, arrays):
                write_safetensors(partial / name, part)
            hashes = {name: sha256_file(partial / name) for name in names}
            write_json(partial / _STATE, {**facts, "sha256": hashes})
        self._drop_old()

    def _drop_old(self) -> None:
        for old in self._steps()[: -self._keep_last]:
            shutil.rmtree(old, ignore_errors=True)

    def _read(self, path: Path) -> Position:
        position = Position(**_checked_state(path))
        if (path / _SHARDS).is_dir():
            from lexmill.train.shards import load_shards

            load_shards(path / _SHARDS, self._model, self._optimizers)
            return position
        weights, state = _arrays(path / _FILES[0]), _arrays(path / _FILES[1])
        self._take_weights(weights)
        self._optimizers.restore(state)
        return position

    def _save_shards(self, target: Path, position: Position) -> None:
        from lexmill.train.shards import save_shards

        partial = target.with_name(f".{target.name}.partial")
        save_shards(partial / _SHARDS, self._model, self._optimizers)
        self._processes.wait()
        if self._processes.first:
            files = sorted(path.relative_to(partial).as_posix() for path in (partial / _SHARDS).iterdir())
            hashes = {name: sha256_file(partial / name) for name in files}
            write_json(partial / _STATE, {**vars(position), "sha256": hashes})
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            self._drop_old()
        self._processes.wait()

    def _weights(self) -> dict[str, np.ndarray]:
        """Copies of the weights that learn; a spread model's are gathered, in all processes at once."""
        return {
            name: whole(parameter.detach()).to("cpu", copy=True).numpy()
            for name, parameter in self._learned()
        }

    def _learned(self) -> list[tuple[str, nn.Parameter]]:
        """What a checkpoint holds: a base that does not learn comes from its own directory again."""
        named = self._model.named_parameters()
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def _take_weights(self, weights: dict[str, np.ndarray]) -> None:
        with torch.no_grad():
            for name, parameter in self._learned():
                value = torch.from_numpy(weights[name]).to(parameter.device)
                if value.shape != parameter.shape:
                    raise ValueError(f"{name} has the shape {tuple(value.shape)}")
                parameter.copy_(placed_like(value, parameter))

    def _steps(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step-*") if path.is_dir())


def _checked_state(path: Path) -> dict[str, Any]:
    """What `state.json` says, once all files agree with their hashes."""
    state = read_json(path / _STATE, "checkpoint")
    for name, expected in state.pop("sha256").items():
        if sha256_file(path / name) != expected:
            raise LexmillError(f"{path / name} is damaged: its hash differs.")
    return state


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with SafetensorsFile.open(path) as file:
        return {name: np.array(file.array(name)) for name in file.names()}
