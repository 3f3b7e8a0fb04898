"""Checkpoints that hold everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lexmill.errors import LexmillError
from lexmill.files import atomic_directory, read_json, remove_partials, sha256_file, write_json
from lexmill.formats.safetensors import SafetensorsFile, write_safetensors
from lexmill.progress import SILENT, Progress
from lexmill.train.optimizers import OptimizerSet

_KEPT = 2


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


def save_checkpoint(folder: Path, model: nn.Module, optimizers: OptimizerSet, position: Position) -> None:
    """Write `folder/step-NNNNNNNN`, whole or not at all, and drop all but the newest two."""
    weights = {name: parameter.detach().cpu().numpy() for name, parameter in model.named_parameters()}
    with atomic_directory(folder / f"step-{position.step:08d}") as target:
        write_safetensors(target / "model.safetensors", weights)
        write_safetensors(
            target / "optimizer.safetensors",
            optimizers.state() | {"torch_rng": torch.get_rng_state().numpy()},
        )
        files = ("model.safetensors", "optimizer.safetensors")
        hashes = {name: sha256_file(target / name) for name in files}
        write_json(target / "state.json", {**vars(position), "sha256": hashes})
    for old in _checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizers: OptimizerSet, progress: Progress = SILENT
) -> Position | None:
    """Take up the newest whole checkpoint; a damaged one is named and the one before it is taken.

    Returns:
        Where the run stood, or None when there is no checkpoint.
    """
    if folder.is_dir():
        remove_partials(folder)
    for path in reversed(_checkpoints(folder)):
        try:
            state = read_json(path / "state.json", "checkpoint")
            for name, expected in state.pop("sha256").items():
                if sha256_file(path / name) != expected:
                    raise LexmillError(f"{path / name} is damaged: its hash differs.")
            position = Position(**state)
            weights, arrays = _read(path / "model.safetensors"), _read(path / "optimizer.safetensors")
        except (LexmillError, KeyError, TypeError, AttributeError) as error:
            progress.say(f"Checkpoint {path.name} cannot be used ({error}); trying the one before.")
            continue
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(weights[name]))
        torch.set_rng_state(torch.from_numpy(arrays.pop("torch_rng")))
        optimizers.restore(arrays)
        return position
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _read(path: Path) -> dict[str, np.ndarray]:
    with SafetensorsFile.open(path) as file:
        return {name: np.array(file.array(name)) for name in file.names()}
