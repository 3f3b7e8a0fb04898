"""A recipe on many processes: the first one runs it, the others join in where a step trains a model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lexmill.devices import process_count, process_rank
from lexmill.progress import SILENT
from lexmill.recipe.config import Recipe
from lexmill.recipe.steps import STEP_KINDS, Place

# Steps that all processes do together.
_TRAINING = ("pretrain", "finetune")


def is_follower() -> bool:
    """Whether this is one of several processes, and not the first."""
    return process_rank() > 0


def call(step: str, place: Place) -> None:
    """Bid the others do a step too, if it trains; the first process does it after this call."""
    if step in _TRAINING:
        _tell((step, str(place.run), str(place.work), place.lineage))


def dismiss() -> None:
    """Let the others go: the recipe is at its end, or cannot go on."""
    with contextlib.suppress(RuntimeError):  # after a failure they may be gone already
        _tell(None)


def follow(recipe: Recipe) -> None:
    """What all processes but the first do: wait until a step trains, and train with it."""
    while True:
        told = _processes().as_first_says(None)
        if told is None:
            return
        step, run, work, lineage = told
        STEP_KINDS[step].make(Place(Path(run), Path(work), recipe, SILENT, lineage))


def _tell(what: Any) -> None:
    if process_count() > 1:
        _processes().as_first_says(what)


def _processes() -> Any:
    from lexmill.train.processes import Processes

    return Processes.join()
