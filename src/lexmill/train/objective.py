"""What is being learned: an objective gives the losses of a batch, and `measure` adds them up over many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lexmill.errors import TrainingError
from lexmill.train.batches import Batch


@dataclass
class Losses:
    """What an objective found in a batch, by what was to be predicted: "tokens", and "pairs" (next sentences).

    Attributes:
        sums: of cross-entropies over all targets, in nats.
        right: how many first guesses were right; filled where no gradient is wanted.
        weights: of the means in what training lowers, where not 1.
        figures: sums that only tell, and over how many; filled where no gradient is wanted.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    figures: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, name: str, found: tuple[Tensor, int | None]) -> None:
        """Put in what `linear_cross_entropy` gave."""
        self.sums[name] = found[0]
        if found[1] is not None:
            self.right[name] = found[1]


Objective = Callable[[Any, Batch], Losses]


@dataclass(frozen=True)
class Measure:
    """Means over many batches, by what was predicted.

    Attributes:
        losses: in nats a target.
        accuracies: shares of targets whose most probable guess is right.
        targets: how many there were.
        more: means that only tell.
    """

    losses: dict[str, float]
    accuracies: dict[str, float]
    targets: dict[str, int]
    more: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """What training lowers: the sum of the means."""
        return sum(self.losses.values())

    def figures(self, prefix: str) -> dict[str, float]:
        """For a log: the loss, and where more than the next token is predicted, every part and its accuracy."""
        found = {f"{prefix}_loss": round(self.loss, 5)}
        if len(self.losses) > 1:
            found |= {f"{prefix}_{name}_loss": round(value, 5) for name, value in self.losses.items()}
        return (
            found
            | {f"{prefix}_{name}_accuracy": round(value, 5) for name, value in self.accuracies.items()}
            | {f"{prefix}_{name}": round(value, 5) for name, value in self.more.items()}
        )


def measure(model: nn.Module, objective: Objective, batches: Iterable[Batch]) -> Measure:
    """Losses and accuracies over all targets of `batches`, without learning.

    Raises:
        TrainingError: there are no targets.
    """
    sums: dict[str, float] = {}
    right: dict[str, int] = {}
    targets: dict[str, int] = {}
    more: dict[str, tuple[float, int]] = {}
    learning = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            found = objective(model, batch)
            for name, (total, count) in found.figures.items():
                before = more.get(name, (0.0, 0))
                more[name] = before[0] + total, before[1] + count
            for name, count in batch.counts.items():
                if count and name in found.sums:
                    targets[name] = targets.get(name, 0) + count
                    sums[name] = sums.get(name, 0.0) + float(found.sums[name])
                    right[name] = right.get(name, 0) + found.right.get(name, 0)
    model.train(learning)
    if not targets:
        raise TrainingError("There are no targets to measure a loss on.")
    return Measure(
        {name: sums[name] / count for name, count in targets.items()},
        {name: right[name] / count for name, count in targets.items()},
        targets,
        {name: total / max(count, 1) for name, (total, count) in more.items()},
    )
