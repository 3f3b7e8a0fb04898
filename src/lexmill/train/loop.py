"""The one training loop: batches, gradients, steps, logging, checkpoints. It does not know what is learned."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn

from lexmill.errors import ConfigError, TrainingError
from lexmill.progress import SILENT, Progress
from lexmill.train.batches import Batch, Loader
from lexmill.train.checkpoint import Position, load_checkpoint, save_checkpoint
from lexmill.train.metrics import MetricsLog
from lexmill.train.objective import Objective
from lexmill.train.optimizers import OptimizerSet
from lexmill.train.precision import autocast, choose_precision
from lexmill.train.schedule import learning_rate_factor

# A budget in minutes becomes a number of steps after so many; the first ones are slow and do not count.
_CALIBRATION_STEPS = 12
_SLOW_STEPS = 4
_MOST_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how to train. Exactly one of `steps`, `tokens`, `minutes` is the budget."""

    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    rows: int = 16  # rows of `context` tokens in a step
    micro_rows: int | None = None  # rows computed at once; all of them when not given
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 3e-3  # of AdamW
    matrix_learning_rate: float = 0.02  # of Muon
    weight_decay: float = 0.0
    warmup: int = 10  # steps
    decay: float = 0.4  # fraction of the run, at its end
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    validate_every: int = 100  # steps
    sample_every: int = 200  # steps
    checkpoint_seconds: float = 15.0

    def __post_init__(self) -> None:
        budgets = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(budgets) != 1:
            raise ConfigError(
                f"exactly one of 'steps', 'tokens' and 'minutes' must be set, not {len(budgets)}.",
                "Remove the others, or set one.",
            )
        if getattr(self, budgets[0]) <= 0:
            raise ConfigError(f"'{budgets[0]}' must be positive.")
        for name in ("rows", "validate_every", "sample_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1.")
        if self.micro_rows is not None and not 1 <= self.micro_rows <= self.rows:
            raise ConfigError(f"'micro_rows' must lie between 1 and 'rows' ({self.rows}).")
        if not 0 < self.decay <= 1:
            raise ConfigError("'decay' must lie in (0, 1].")


@dataclass(frozen=True)
class Hooks:
    """What a run does beside training; each may be None."""

    validate: Callable[[nn.Module], dict[str, float]] | None = None
    sample: Callable[[nn.Module, int], None] | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    steps: int
    tokens: int
    seconds: float
    loss: float
    skipped: int
    precision: str


def train(
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    config: TrainConfig,
    folder: Path,
    *,
    label: str = "training",
    hooks: Hooks | None = None,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train `model` in place, going on from the newest checkpoint in `folder` if there is one.

    `folder` receives `metrics.jsonl` and, while the run lasts, `checkpoints/`. A run that was
    killed and started again gives bit for bit the weights of one that was not.

    Raises:
        TrainingError: no targets, or ten steps in a row whose gradient is not finite.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    model.train()
    run = _Run(model, objective, loader, config, folder, hooks or Hooks())
    run.resume(progress)
    with progress.task(
        label, config.minutes * 60 if config.minutes else run.position.total_steps, run.unit
    ) as task:
        task.advance(run.position.seconds if config.minutes else run.position.step)
        task.started -= run.position.seconds
        with _graceful_interrupt() as interrupted:
            while not run.finished:
                before = run.position.seconds
                run.step(progress)
                task.advance(run.position.seconds - before if config.minutes else 1, run.note)
                if interrupted.is_set():
                    run.save()
                    raise KeyboardInterrupt
    model.eval()
    run.log.close()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    position = run.position
    return TrainResult(
        position.step, position.tokens, position.seconds, run.smooth_loss, position.skipped, run.precision
    )


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        loader: Loader,
        config: TrainConfig,
        folder: Path,
        hooks: Hooks,
    ) -> None:
        self.model, self.objective, self.loader, self.config, self.hooks = (
            model,
            objective,
            loader,
            config,
            hooks,
        )
        self.folder = folder
        self.unit = "seconds" if config.minutes else "steps"
        self.precision = choose_precision(config.precision)
        self.optimizers = OptimizerSet(
            model,
            kind=config.optimizer,
            learning_rate=config.learning_rate,
            matrix_learning_rate=config.matrix_learning_rate,
            weight_decay=config.weight_decay,
            precision=self.precision,
        )
        self.position = Position(precision=self.precision)
        self.log = MetricsLog(folder / "metrics.jsonl")
        self.smooth_loss = math.nan
        self.note = ""
        self._slow_seconds = 0.0
        self._skipped_in_a_row = 0
        self._last_save = time.perf_counter()

    @property
    def finished(self) -> bool:
        """Whether the budget is used up."""
        return 0 < self.position.total_steps <= self.position.step

    def resume(self, progress: Progress) -> None:
        """Start at the newest checkpoint, or from nothing."""
        torch.manual_seed(self.config.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        found = load_checkpoint(self.folder / "checkpoints", self.model, self.optimizers, progress)
        if found:
            self.position = found
            if found.precision and found.precision != self.precision:
                self.precision = found.precision
                self.optimizers.set_precision(found.precision)
            self.loader.restore(found.loader or {})
            progress.say(f"going on from step {found.step:,}")
        elif self.config.steps:
            self.position.total_steps = self.config.steps
        elif self.config.tokens:
            first = self.loader.next()
            self.position.total_steps = max(1, round(self.config.tokens / first.size))
            self.loader.restore({"epoch": 0, "position": 0})
        self.log.resume(self.position.step)

    def step(self, progress: Progress) -> None:
        """One update of the weights, and what belongs after it."""
        started = time.perf_counter()
        position, config = self.position, self.config
        batch = self.loader.next()
        loss = self._gradients(batch)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        total = position.total_steps or 1 << 30
        factor = learning_rate_factor(position.step, total, config.warmup, config.decay)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizers.step(factor)
            self._skipped_in_a_row = 0
        else:
            self._skip(progress, loss, norm)
        position.step += 1
        position.tokens += batch.size
        position.loader = self.loader.state()
        took = time.perf_counter() - started
        position.seconds += took
        self.smooth_loss = loss if math.isnan(self.smooth_loss) else 0.9 * self.smooth_loss + 0.1 * loss
        rate = batch.size / took
        self.note = f"loss {self.smooth_loss:.3f}  {rate:,.0f} tokens/s"
        self.log.write(
            step=position.step,
            loss=round(loss, 5),
            learning_rate_factor=round(factor, 4),
            gradient_norm=round(norm, 4),
            tokens=position.tokens,
            seconds=round(position.seconds, 2),
            tokens_per_second=round(rate),
        )
        if config.minutes and not position.total_steps:
            self._calibrate(config.minutes * 60)
        self._hooks(progress)
        due = time.perf_counter() - self._last_save >= config.checkpoint_seconds
        if due and position.total_steps and not self.finished:
            self.save()

    def _calibrate(self, budget_seconds: float) -> None:
        """Turn a budget in seconds into a number of steps, once; a checkpoint remembers it."""
        position = self.position
        if position.step == _SLOW_STEPS:
            self._slow_seconds = position.seconds
        if position.step >= _CALIBRATION_STEPS or position.seconds >= budget_seconds:
            pace = (position.seconds - self._slow_seconds) / max(position.step - _SLOW_STEPS, 1)
            left = max(budget_seconds - position.seconds, 0.0)
            position.total_steps = position.step + round(left / max(pace, 1e-9))

    def _gradients(self, batch: Batch) -> float:
        """Add up the gradient of the mean loss over all targets of the batch; returns that loss.

        Where more than one kind of thing is predicted, the loss is the weighted sum of their means.
        """
        counts = batch.counts
        if not counts["tokens"]:
            raise TrainingError("A batch has no targets.", "Check the data: are the replies empty?")
        rows = self.config.micro_rows or len(batch.tokens)
        total = 0.0
        for start in range(0, len(batch.tokens), rows):
            part = batch.select(slice(start, start + rows))
            with autocast(self.precision):
                losses = self.objective(self.model, part)
                # divided by the targets of the whole batch: parts with unequal targets weigh as they should
                parts = [
                    value * (losses.weights.get(name, 1.0) / counts[name])
                    for name, value in losses.sums.items()
                    if counts[name]
                ]
                loss = torch.stack(parts).sum()
            loss.backward()
            total += float(loss.detach())
        return total

    def _skip(self, progress: Progress, loss: float, norm: float) -> None:
        self.optimizers.clear()
        self.position.skipped += 1
        self._skipped_in_a_row += 1
        progress.say(f"step {self.position.step + 1}: loss {loss}, gradient {norm}: not finite, step skipped")
        if self._skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"The gradient was not finite in {_MOST_SKIPPED_IN_A_ROW} steps in a row.",
                "Lower learning_rate and matrix_learning_rate; the last good checkpoint is kept.",
            )

    def _hooks(self, progress: Progress) -> None:
        config, position = self.config, self.position
        if self.hooks.validate and (position.step % config.validate_every == 0 or self.finished):
            figures = self.hooks.validate(self.model)
            self.log.write(
                step=position.step, seconds=round(position.seconds, 2), tokens=position.tokens, **figures
            )
            shown = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
            progress.say(f"  step {position.step:>6,}  {shown}  {self.note}")
        if self.hooks.sample and (position.step % config.sample_every == 0 or self.finished):
            self.model.eval()  # no dropout in what is shown, and no random numbers taken from training
            self.hooks.sample(self.model, position.step)
            self.model.train()

    def save(self) -> None:
        """Write a checkpoint."""
        self.log.flush()
        save_checkpoint(self.folder / "checkpoints", self.model, self.optimizers, self.position)
        self._last_save = time.perf_counter()


class _graceful_interrupt:
    """The first Ctrl-C lets the step end and a checkpoint be written; the second one does not wait."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._old: Any = None

    def __enter__(self) -> threading.Event:
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGINT, self._heard)
        return self._event

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)
