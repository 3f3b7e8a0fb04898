"""The one training loop: batches, gradients, steps, logging, checkpoints. It does not know what is learned."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from lexmill.config import suggest, to_mapping
from lexmill.errors import ConfigError, TrainingError
from lexmill.files import write_json
from lexmill.model.spreading import whole
from lexmill.progress import SILENT, Progress
from lexmill.train.batches import Batch, Loader
from lexmill.train.checkpoint import Checkpoints, Position
from lexmill.train.config import LOSS, TrainConfig, lower_is_better
from lexmill.train.memory import explain_no_memory
from lexmill.train.metrics import MetricsLog
from lexmill.train.objective import Objective
from lexmill.train.optimizers import OptimizerSet
from lexmill.train.parallel import (
    Task,
    gathered,
    own_parts,
    recompute_blocks,
    spread,
    synchronised,
    uncompiled,
)
from lexmill.train.precision import autocast, choose_precision
from lexmill.train.processes import Processes
from lexmill.train.schedule import learning_rate_factor
from lexmill.train.trackers import tracking
from lexmill.train.watch import LossWatch

# A budget in minutes becomes a number of steps after so many; the first ones are slow and do not count.
_CALIBRATION_STEPS = 12
_SLOW_STEPS = 4
_NAMED_DOCUMENTS = 8  # of a batch whose loss jumps


@dataclass(frozen=True)
class Hooks:
    """What a run does beside training; each may be None."""

    validate: Callable[[nn.Module], dict[str, float]] | None = None
    sample: Callable[[nn.Module, int], None] | None = None
    name_documents: Callable[[Sequence[int]], list[str]] | None = None  # numbers of documents to their ids


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    steps: int
    tokens: int
    seconds: float
    loss: float
    skipped: int
    precision: str
    best_step: int = 0  # where the weights come from, if the best ones are kept
    best: float | None = None  # their figure, `metric`
    metric: str = ""
    stopped_early: bool = False


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
    processes: Processes | None = None,
) -> TrainResult:
    """Train `model` in place, going on from the newest checkpoint in `folder` if there is one.

    `folder` receives `training.json` (what the run was told), `metrics.jsonl` and, while the run
    lasts, `checkpoints/`. A run that was killed and started again gives bit for bit the weights of
    one that was not (same machine, same number of threads and processes; with another number of
    processes the data come in the same order).

    Args:
        processes: those that train together; joined here when not given.

    Raises:
        TrainingError: no targets, steps in a row whose gradient is not finite, no memory, or
            another process of the run was lost.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    processes = processes or Processes.join(config.device, deterministic=config.deterministic)
    if not processes.first:
        progress = SILENT
    facts = {
        "stage": label,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "learning": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "processes": processes.world,
        "settings": to_mapping(config),
    }
    model.train()
    run = _Run(model, objective, loader, config, folder, hooks or Hooks(), processes, progress)
    with run.checkpoints, processes.explain_loss_of_others():
        run.resume()
        facts["precision"] = run.precision
        if processes.first:
            write_json(folder / "training.json", facts)
        track = config.track if processes.first else ()
        with (
            tracking(track, folder, run.position.step, facts, progress) as trackers,
            progress.task(
                label, config.minutes * 60 if config.minutes else run.position.total_steps, run.unit
            ) as task,
        ):
            run.log.listeners += [task.figures, trackers.log]
            task.advance(run.position.seconds if config.minutes else run.position.step)
            task.started -= run.position.seconds
            with _graceful_interrupt() as interrupted:
                while not run.finished:
                    before = run.position.seconds
                    stop = run.step(interrupted.is_set())
                    task.advance(run.position.seconds - before if config.minutes else 1, run.note)
                    if stop:
                        run.save()
                        run.checkpoints.wait()
                        raise KeyboardInterrupt
        return run.finish()


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
        processes: Processes | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.model, self.loader, self.config, self.hooks = model, loader, config, hooks
        self.folder, self.progress = folder, progress
        self.processes = processes = processes or Processes()
        self.unit = "seconds" if config.minutes else "steps"
        self.precision = processes.as_first_says(choose_precision(config.precision, processes.device.type))
        recompute_blocks(model, config.gradient_checkpointing)
        self.task = spread(Task(model, objective), processes, config.sharding, config.compile)
        self.optimizers = OptimizerSet.of_run(model, config, self.precision)
        self.position = Position(precision=self.precision)
        self.checkpoints = Checkpoints(
            folder / "checkpoints",
            model,
            self.optimizers,
            keep_last=config.keep_last,
            processes=processes,
            sharded=processes.group and config.sharding == "shard",
            progress=progress,
        )
        self.log = MetricsLog(folder / "metrics.jsonl" if processes.first else None)
        self.watch = LossWatch()
        self.metric = config.stop_metric or LOSS
        if config.patience and self.hooks.validate is None:
            raise ConfigError("'patience' needs validation, and nothing is held out to validate on.")
        self.note = ""
        self._slow_seconds = 0.0
        self._skipped_in_a_row = 0
        self._last_save = time.perf_counter()

    @property
    def finished(self) -> bool:
        """Whether the budget is used up, or training stopped early."""
        return self.position.stopped or 0 < self.position.total_steps <= self.position.step

    def resume(self) -> None:
        """Start at the newest checkpoint, or from nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self.checkpoints.load()
        if found:
            self.position = found
            if found.precision and found.precision != self.precision:
                self.precision = found.precision
                self.optimizers.set_precision(found.precision)
            self.loader.restore(found.loader or {})
            self.progress.say(f"going on from step {found.step:,}")
        elif self.config.steps:
            self.position.total_steps = self.config.steps
        elif self.config.tokens:
            first = self.loader.next(0)
            self.position.total_steps = max(1, round(self.config.tokens / first.size))
            self.loader.restore({"epoch": 0, "position": 0})
        self.log.resume(self.position.step)

    def step(self, interrupted: bool = False) -> bool:
        """One update of the weights, and what belongs after it; whether some process was told to stop."""
        started = time.perf_counter()
        position, config = self.position, self.config
        total = position.total_steps or 1 << 30
        batch = self.loader.next(total - position.step - 1 if position.total_steps else None)
        _seed_step(config.seed, position.step, self.processes.rank)
        loss, told, due = self.processes.sums(
            self._gradients(batch), float(interrupted), float(self.processes.first and self._save_is_due())
        )
        norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)))
        factor = learning_rate_factor(position.step, total, config.warmup, config.decay)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizers.step(factor)
            self._skipped_in_a_row = 0
        else:
            self._skip(loss, norm, batch)
        position.step += 1
        position.tokens += batch.size
        position.loader = self.loader.state()
        took = time.perf_counter() - started
        position.seconds += took
        spike = self.watch.is_spike(loss)
        rate = batch.size / took
        self.note = f"loss {self.watch.smooth:.3f}  {rate:,.0f} tokens/s"
        self.log.write(
            step=position.step,
            loss=round(loss, 5),
            learning_rate_factor=round(factor, 4),
            gradient_norm=round(norm, 4),
            tokens=position.tokens,
            seconds=round(position.seconds, 2),
            tokens_per_second=round(rate),
        )
        if spike:
            self._tell_spike(loss, batch)
        if config.minutes and not position.total_steps:
            self._calibrate(config.minutes * 60)
        self._hooks()
        if due and position.total_steps and not self.finished:
            self.save()
        return told > 0

    def _save_is_due(self) -> bool:
        waited = time.perf_counter() - self._last_save
        return waited >= self.config.checkpoint_seconds and not self.checkpoints.busy

    def _calibrate(self, budget_seconds: float) -> None:
        """Turn a budget in seconds into a number of steps, once; a checkpoint remembers it."""
        position = self.position
        if position.step == _SLOW_STEPS:
            self._slow_seconds = position.seconds
        total = 0
        if position.step >= _CALIBRATION_STEPS or position.seconds >= budget_seconds:
            pace = (position.seconds - self._slow_seconds) / max(position.step - _SLOW_STEPS, 1)
            left = max(budget_seconds - position.seconds, 0.0)
            total = position.step + round(left / max(pace, 1e-9))
        position.total_steps = self.processes.as_first_says(total)

    def _gradients(self, batch: Batch) -> float:
        """Add up the gradient of the mean loss over all targets of the step; this process's part of that loss.

        Where more than one kind of thing is predicted, the loss is the weighted sum of their means.
        """
        counts = batch.counts
        if not counts["tokens"]:
            raise TrainingError("A batch has no targets.", "Check the data: are the replies empty?")
        # divided by the targets of the whole step: parts with unequal targets weigh as they should.
        # Wrappers average gradients over processes, so each takes its part `world` times.
        world = self.processes.world
        scales = {name: world / count for name, count in counts.items() if count}
        parts = own_parts(batch, self.processes, self.config.micro_rows)
        total = 0.0
        rows, length = batch.tokens.shape
        with explain_no_memory(self.config.micro_rows or rows, length):
            for number, part in enumerate(parts, 1):
                with synchronised(self.task, last=number == len(parts)):
                    with autocast(self.precision, self.processes.device.type):
                        loss = self.task(part, scales)
                    loss.backward()
                total += float(loss.detach())
        return total / world

    def _skip(self, loss: float, norm: float, batch: Batch) -> None:
        self.optimizers.clear()
        self.position.skipped += 1
        self._skipped_in_a_row += 1
        self.log.write(step=self.position.step + 1, skipped=1, documents=_origins(batch)[:64])
        self.progress.say(
            f"step {self.position.step + 1:,}: loss {loss}, gradient {norm}: not finite, step skipped"
            f"{self._named(batch)}"
        )
        if self._skipped_in_a_row >= self.config.max_skipped:
            self.checkpoints.wait()
            raise TrainingError(
                f"The gradient was not finite in {self._skipped_in_a_row} steps in a row (max_skipped).",
                "Lower learning_rate and matrix_learning_rate; the last good checkpoint is kept.",
            )

    def _tell_spike(self, loss: float, batch: Batch) -> None:
        numbers = _origins(batch)
        self.log.write(step=self.position.step, spike=round(loss, 5), documents=numbers[:64])
        self.progress.say(
            f"step {self.position.step:,}: the loss jumped to {loss:.3f} (it was {self.watch.usual:.3f})"
            f"{self._named(batch)}"
        )

    def _named(self, batch: Batch) -> str:
        """Which documents a batch holds, in words."""
        numbers = _origins(batch)
        if not numbers:
            return ""
        shown = numbers[:_NAMED_DOCUMENTS]
        names = self.hooks.name_documents(shown) if self.hooks.name_documents else list(map(str, shown))
        more = f" and {len(numbers) - len(shown):,} more" if len(numbers) > len(shown) else ""
        return f"; its documents: {', '.join(names)}{more}"

    def _hooks(self) -> None:
        config, position = self.config, self.position
        if self.hooks.validate and (position.step % config.validate_every == 0 or self.finished):
            with gathered(self.task):
                figures = self.hooks.validate(self.model)
            self.log.write(
                step=position.step, seconds=round(position.seconds, 2), tokens=position.tokens, **figures
            )
            shown = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
            self.progress.say(f"  step {position.step:>6,}  {shown}  {self.note}")
            self._keep_best(figures)
        if self.hooks.sample and (position.step % config.sample_every == 0 or self.finished):
            self.model.eval()  # no dropout in what is shown
            with gathered(self.task), uncompiled():  # texts of any length: each would be compiled anew
                self.hooks.sample(self.model, position.step)
            self.model.train()

    def _keep_best(self, figures: dict[str, float]) -> None:
        """Keep the weights if this validation is the best one; stop when too many were not."""
        config, position = self.config, self.position
        if not config.keep_best:
            return
        if f"validation_{self.metric}" not in figures:
            known = [name.removeprefix("validation_") for name in figures]
            raise ConfigError(
                f"'stop_metric' is '{self.metric}', which a validation of this run does not give.",
                suggest(self.metric, known),
            )
        found = self.processes.as_first_says(figures[f"validation_{self.metric}"])
        sign = -1 if lower_is_better(self.metric) else 1
        if math.isfinite(found) and (position.best is None or sign * found > sign * position.best):
            position.best, position.best_step, position.stale = found, position.step, 0
            self.checkpoints.save_best(position)
            return
        position.stale += 1
        if config.patience and position.stale >= config.patience and not self.finished:
            position.stopped = True
            self.progress.say(
                f"  {position.stale} validations without a better {self.metric.replace('_', ' ')}, so training "
                f"stops; the best was at step {position.best_step:,}"
            )

    def save(self) -> None:
        """Write a checkpoint, beside training."""
        self.log.flush()
        self.checkpoints.save(self.position)
        self._last_save = time.perf_counter()

    def finish(self) -> TrainResult:
        """The end of the run: the model in its final state, no checkpoints."""
        position = self.position
        if position.best is not None:
            self.checkpoints.load_best()
        self.model.eval()
        self.log.close()
        self.checkpoints.remove()
        return TrainResult(
            position.step,
            position.tokens,
            position.seconds,
            self.watch.smooth,
            position.skipped,
            self.precision,
            position.best_step,
            position.best,
            self.metric if position.best is not None else "",
            position.stopped,
        )


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step (dropout) follow from where the run stands: nothing to store or restore."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _origins(batch: Batch) -> list[int]:
    if batch.origins is None:
        return []
    return [int(number) for number in np.unique(batch.origins) if number >= 0]


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
