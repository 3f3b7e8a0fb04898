"""What a run will cost, before it starts: parameters, operations, memory and time, from a short calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from lexmill.devices import (
    available_memory,
    give_back_freed_memory,
    resident_memory,
    this_machine,
    threads,
)
from lexmill.model.config import ModelConfig
from lexmill.model.transformer import Transformer
from lexmill.train.calibration import Calibration, calibrate, peak_flops, rows_in
from lexmill.train.config import TrainConfig
from lexmill.train.cost import (
    AdapterCost,
    Memory,
    Parameters,
    Row,
    checkpoint_bytes,
    count_parameters,
    learning_numbers,
    optimizer_flops,
    process_memory,
    row_flops,
)
from lexmill.train.objective import Objective
from lexmill.train.parallel import Sharding
from lexmill.train.precision import choose_precision
from lexmill.train.processes import find_device

CALIBRATION_SECONDS = 8.0
_PART_SECONDS = 1.5  # a part of a calibration step takes no longer, about
_USABLE = 0.95  # of the memory that is free


@dataclass(frozen=True)
class Data:
    """What there is to learn from, where that is known.

    Attributes:
        tokens: of the training split.
        documents: of it.
        exact: whether they were counted; else estimated from a part.
    """

    tokens: int
    documents: int
    exact: bool


@dataclass(frozen=True)
class Time:
    """How long a run takes, if this machine goes on as in the calibration.

    Attributes:
        step_seconds: median; `low` and `high` of what nine of ten steps lie between.
        seconds: of all steps; `seconds_low` and `seconds_high` likewise.
        validation_seconds: of all validations, which come on top.
        tokens_per_second: in steps.
        peak_flops: the best rate of a matrix product here, and `peak_share` what a step's own
            products (without the optimiser's) reach of it.
        calibration_rows: rows that were computed at once to find out.
        calibration_steps: how often.
    """

    step_seconds: float
    step_low: float
    step_high: float
    seconds: float
    seconds_low: float
    seconds_high: float
    validation_seconds: float
    tokens_per_second: float
    peak_flops: float
    peak_share: float
    calibration_rows: int
    calibration_steps: int


@dataclass(frozen=True)
class Forecast:
    """What `lexmill pretrain --plan` says. Bytes, seconds, operations; tokens include what fills rows.

    Attributes:
        flops: of one token, on average; `step_flops` and `total_flops` of a step and of the run.
        update_flops: of the optimiser, a step; not part of the others.
        memory: of one process with the chosen sharding; `replicate` and `shard` of one of several.
        memory_available: to this process, on the device that it computes on.
        memory_measured: whether as many rows as the run has at once were tried; else a step's part is
            an estimate, corrected by fewer rows where any were tried.
        checkpoint: bytes on disk of one; `disk` with all that are kept, and the finished model.
        warnings: what will not work and what to change.
    """

    parameters: Parameters
    precision: str
    device: str
    machine: str
    threads: int
    processes: int
    steps: int
    tokens_per_step: int
    tokens: int
    epochs: float | None
    data: Data | None
    flops: float
    step_flops: float
    total_flops: float
    update_flops: float
    rows_at_once: int
    memory: Memory
    replicate: Memory | None
    shard: Memory | None
    memory_available: int
    memory_measured: bool
    checkpoint: int
    disk: int
    time: Time | None
    learning: int  # weights that learn: all, or an adapter's
    warnings: tuple[str, ...] = field(default=())


def forecast(
    config: TrainConfig,
    shape: ModelConfig,
    objective: Objective,
    row: Row,
    *,
    data: Data | None = None,
    world: int = 1,
    validation_tokens: int = 0,
    seconds: float = CALIBRATION_SECONDS,
    adapter: AdapterCost | None = None,
    build: Callable[[], Transformer] | None = None,
) -> Forecast:
    """Say what `train` will cost with these settings; nothing is written.

    Args:
        objective: as the run has it.
        row: what a row holds.
        world: processes that train together, each on a machine or GPU like this one.
        validation_tokens: in each validation.
        seconds: for the calibration, about; 0 leaves it out, and time is not known then.
        adapter: if not the model learns but this; `build` then makes the model with it for the calibration.
    """
    device = find_device(config.device)
    precision = choose_precision(config.precision, device.type)
    give_back_freed_memory()  # what reading documents left is no part of the program
    own_rows = -(-config.rows // world)
    at_once = min(config.micro_rows or own_rows, own_rows)
    run = _Question(config, shape, row, world, own_rows, precision, resident_memory(), data, adapter)
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    peak = peak_flops(precision, device) if seconds else 0.0
    # the calibration must not run out of memory itself
    rows = run.fitting(at_once, available, device.type, alone=True)
    found = None
    if seconds and rows:
        rows = rows_in(_PART_SECONDS, shape, row, rows, peak)
        found = calibrate(
            shape,
            objective,
            row,
            config,
            rows=rows,
            precision=precision,
            device=device,
            seconds=seconds,
            adapter=adapter,
            build=build,
        )
        run = replace(run, correction=found.correction)
    time = _time(run, found, peak, validation_tokens) if found else None
    steps = _steps(config, row, time.step_seconds if time else 0.0)
    memories = {kind: run.memory(at_once, kind) for kind in ("replicate", "shard")}
    memory = memories[config.sharding]
    work = row_flops(shape, row, adapter)
    tokens = steps * config.rows * row.tokens
    checkpoint = checkpoint_bytes(shape, config.optimizer, adapter)
    learning = learning_numbers(shape, adapter)
    weights = 4 * learning
    return Forecast(
        parameters=count_parameters(shape),
        precision=precision,
        device=device.type,
        machine=torch.cuda.get_device_name(device) if device.type == "cuda" else this_machine().cpu_class,
        threads=threads(),
        processes=world,
        steps=steps,
        tokens_per_step=config.rows * row.tokens,
        tokens=tokens,
        epochs=round(tokens / data.tokens, 2) if data and data.tokens else None,
        data=data,
        flops=work.total / row.tokens,
        step_flops=work.total * config.rows,
        total_flops=work.total * config.rows * steps,
        update_flops=0.0 if adapter else optimizer_flops(shape, config.optimizer),
        rows_at_once=at_once,
        memory=memory,
        replicate=memories["replicate"] if world > 1 else None,
        shard=memories["shard"] if world > 1 else None,
        memory_available=available,
        memory_measured=found is not None and found.memory > 0 and found.rows == at_once,
        checkpoint=checkpoint,
        # one more stands while the newest is written
        disk=checkpoint * (config.keep_last + 1) + weights * (2 if config.keep_best else 1),
        time=time,
        learning=learning,
        warnings=_warnings(run, at_once, available, device.type),
    )


@dataclass(frozen=True)
class _Question:
    """The run whose memory is asked for."""

    config: TrainConfig
    shape: ModelConfig
    row: Row
    world: int
    own_rows: int
    precision: str
    program: int
    data: Data | None
    adapter: AdapterCost | None = None
    correction: float = 1.0

    def memory(self, at_once: int, sharding: Sharding | None = None, alone: bool = False) -> Memory:
        """Of one process. `alone`: of a calibration, which has no data, no checkpoint and no other process."""
        return process_memory(
            self.shape,
            self.row,
            optimizer=self.config.optimizer,
            precision=self.precision,
            rows_at_once=at_once,
            parts=1 if alone else -(-self.own_rows // at_once),
            world=1 if alone else self.world,
            sharding=sharding or self.config.sharding,
            correction=self.correction,
            program=self.program,
            data_tokens=self.data.tokens if self.data and not alone else 0,
            adapter=self.adapter,
            recompute=self.config.gradient_checkpointing,
        )

    def needed(self, at_once: int, device: str, alone: bool = False) -> int:
        """Bytes that are still to be had."""
        memory = self.memory(at_once, alone=alone)
        if device == "cuda":
            return memory.on_device
        return memory.on_device if alone else memory.total - memory.program

    def fitting(self, most: int, available: int, device: str, alone: bool = False) -> int:
        """The most rows at once, up to `most`, that fit; 0 where not even one does, `most` where nobody knows."""
        if not available:
            return most
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.needed(middle, device, alone) <= _USABLE * available:
                low = middle
            else:
                high = middle - 1
        return low


def _time(run: _Question, found: Calibration, peak: float, validation_tokens: int) -> Time:
    config, row = run.config, run.row
    scale = run.own_rows / found.rows
    parts, updates = np.array(found.part_seconds), np.array(found.update_seconds)
    step = float(np.median(parts) * scale + np.median(updates))
    low, high = (
        float(np.quantile(parts, share) * scale + np.quantile(updates, share)) for share in (0.05, 0.95)
    )
    steps = _steps(config, row, step)
    total = 60 * config.minutes if config.minutes else steps * step
    spread = (1.0, 1.0) if config.minutes else (low / step, high / step)
    token_seconds = float(np.median(parts)) / (found.rows * row.tokens)
    # forward alone is a third of forward and back
    validations = -(-steps // config.validate_every)
    return Time(
        step_seconds=step,
        step_low=low,
        step_high=high,
        seconds=total,
        seconds_low=total * spread[0],
        seconds_high=total * spread[1],
        validation_seconds=validations * validation_tokens * token_seconds / 3,
        tokens_per_second=config.rows * row.tokens / step,
        peak_flops=peak,
        peak_share=row_flops(run.shape, row, run.adapter).total * run.own_rows / step / peak,
        calibration_rows=found.rows,
        calibration_steps=len(parts),
    )


def _steps(config: TrainConfig, row: Row, step_seconds: float) -> int:
    """Steps of the run; 0 where a budget in minutes cannot be turned into steps, because no step was timed."""
    if config.minutes:
        return max(1, round(60 * config.minutes / step_seconds)) if step_seconds else 0
    if config.tokens:
        return max(1, round(config.tokens / (config.rows * row.tokens)))
    return config.steps or 0


def _warnings(run: _Question, at_once: int, available: int, device: str) -> tuple[str, ...]:
    """What does not fit, and what to change."""
    if not available or run.needed(at_once, device) <= _USABLE * available:
        return ()
    needed = run.needed(at_once, device)
    said = f"This run does not fit: it needs {gigabytes(needed)} more, and {gigabytes(available)} are free."
    rows = run.fitting(at_once, available, device)
    if rows:
        return (f"{said} Set micro_rows = {rows}: the result stays the same, a step takes a little longer.",)
    memory = run.memory(1)
    hint = f"{said} A single row at once is still too much ({gigabytes(run.needed(1, device))})."
    if memory.model > _USABLE * available:
        times = memory.model / available
        hint += (
            f" Weights, gradients and optimiser state alone take {gigabytes(memory.model)}, {times:.1f} times what"
            f" is free: choose a model with a smaller width (about {_narrower(run.shape.width, times)}) or fewer"
            " layers"
        )
        if run.config.sharding == "replicate":
            hint += ', or spread it over processes on several machines or GPUs with sharding = "shard"'
        return (f"{hint}.",)
    return (f"{hint} Set a smaller row_length, width or number of layers.",)


def _narrower(width: int, times: float) -> int:
    """A width whose matrices fit, in whole 64s where it is wide."""
    wanted = width / math.sqrt(times * 1.5)
    return max(64 * int(wanted // 64), 16)


def gigabytes(count: float) -> str:
    """Bytes in words: "1.23 GB", "45 MB"."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
