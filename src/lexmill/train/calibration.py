"""A few real steps on random tokens, to know what a step costs on this machine: seconds and memory."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lexmill.devices import give_back_freed_memory, resident_memory
from lexmill.model.build import build_model
from lexmill.model.config import ModelConfig
from lexmill.model.transformer import Transformer
from lexmill.train.batches import Batch
from lexmill.train.config import TrainConfig
from lexmill.train.cost import AdapterCost, Row, process_memory, row_flops
from lexmill.train.examples import IGNORED
from lexmill.train.memory import explain_no_memory
from lexmill.train.objective import Objective
from lexmill.train.optimizers import OptimizerSet
from lexmill.train.parallel import Task, recompute_blocks, spread
from lexmill.train.precision import autocast, matmul_gflops
from lexmill.train.processes import Processes

_SLOW = 2  # rounds at the beginning that do not count, where there are more
_SAMPLE_SECONDS = 0.002
_LEAST_CORRECTION = 0.7
_PEAK_SIZES = (512, 1024)
_GPU_SIZE = 8192
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        rows: that were computed at once.
        part_seconds: forward and back for so many rows, each time.
        update_seconds: clipping the gradient and moving the weights, each time.
        memory: bytes by which this process, or what it holds of the GPU, grew; 0 where that cannot be told.
        correction: that memory without weights, gradients and optimiser state, by its estimate.
    """

    rows: int
    part_seconds: tuple[float, ...]
    update_seconds: tuple[float, ...]
    memory: int
    correction: float


def peak_flops(precision: str, device: torch.device) -> float:
    """The best rate of a matrix product on this machine, in FLOP/s; takes about half a second."""
    dtype = _DTYPES[precision]
    if device.type != "cuda":
        return 1e9 * max(matmul_gflops(dtype, size, 0.25) for size in _PEAK_SIZES)
    a = torch.ones(_GPU_SIZE, _GPU_SIZE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, a)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * _GPU_SIZE**3 / best


def rows_in(seconds: float, config: ModelConfig, row: Row, most: int, peak: float) -> int:
    """So many rows that a part of a step takes about `seconds` at most, if it runs at a quarter of the peak."""
    return int(min(most, max(1, seconds * peak / 4 / row_flops(config, row).total)))


def calibrate(
    config: ModelConfig,
    objective: Objective,
    row: Row,
    training: TrainConfig,
    *,
    rows: int,
    precision: str,
    device: torch.device,
    seconds: float,
    adapter: AdapterCost | None = None,
    build: Callable[[], Transformer] | None = None,
) -> Calibration:
    """Train a model of this shape on random tokens for about so many seconds, then forget it.

    Args:
        rows: computed at once.
        adapter: if not the model learns but this; `build` then makes the model with it, of any weights.

    Raises:
        TrainingError: it does not fit into memory.
    """
    batch = random_batch(config, row, rows, training.seed).to(device)
    watch = _PeakMemory(device)
    with explain_no_memory(rows, row.tokens), watch:
        model = build() if build else _random_model(config)
        parts, updates = _Step(model, objective, training, precision, device).repeat(batch, seconds)
    del model
    expected = process_memory(
        config,
        row,
        optimizer=training.optimizer,
        precision=precision,
        rows_at_once=rows,
        adapter=adapter,
        recompute=training.gradient_checkpointing,
    )
    correction = (watch.bytes - expected.model) / expected.step
    gc.collect()  # the model, before its memory can be given back
    give_back_freed_memory()
    slow = _SLOW if len(parts) > 2 * _SLOW else 1
    return Calibration(
        rows,
        tuple(parts[slow:]),
        tuple(updates[slow:]),
        watch.bytes,
        # a process that had room left before grows less than it uses
        max(correction, _LEAST_CORRECTION) if watch.bytes else 1.0,
    )


def _random_model(config: ModelConfig) -> Transformer:
    """Values like those of a beginning: none so large that a step overflows."""
    model = build_model(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0).add_(1.0) if weight.dim() == 1 else weight.normal_(0, 0.02)
    return model


class _Step:
    """A step of `lexmill.train.loop` without what belongs around it."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        training: TrainConfig,
        precision: str,
        device: torch.device,
    ) -> None:
        recompute_blocks(model, training.gradient_checkpointing)
        alone = Processes(device=device)
        self.task = spread(Task(model, objective), alone, "replicate", training.compile).train()
        self.precision, self.device, self.clip = precision, device, training.clip
        self.optimizers = OptimizerSet.of_run(model, training, precision)

    def repeat(self, batch: Batch, seconds: float) -> tuple[list[float], list[float]]:
        """Seconds of each part and of each update, twice or as often as there is time for."""
        parts: list[float] = []
        updates: list[float] = []
        end = time.perf_counter() + seconds
        while len(parts) < 2 or time.perf_counter() + parts[-1] + updates[-1] < end:
            parts.append(_timed(lambda: self.part(batch), self.device))
            updates.append(_timed(self.update, self.device))
        return parts, updates

    def part(self, batch: Batch) -> None:
        """Gradients of some rows."""
        scales = {name: 1 / count for name, count in batch.counts.items() if count}
        with autocast(self.precision, self.device.type):
            loss = self.task(batch, scales)
        loss.backward()
        float(loss.detach())

    def update(self) -> None:
        """Move the weights."""
        float(nn.utils.clip_grad_norm_(self.task.parameters(), self.clip))
        self.optimizers.step(0.01)


def _timed(work: Any, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def random_batch(config: ModelConfig, row: Row, rows: int, seed: int = 0) -> Batch:
    """Rows as packing makes them: `row.documents` texts in each, some room at the end, random ids."""
    random = np.random.default_rng(seed)
    written = row.decoder_length or row.length
    document, positions = _laid_out(row.length, row.documents)
    targets = np.full((rows, written), IGNORED, np.int64)
    places = min(max(round(row.targets), 1), written)
    for targets_of_row in targets:
        chosen = random.choice(written, places, replace=False)
        targets_of_row[chosen] = random.integers(0, config.vocab_size, places)
    labels = None
    if row.pairs:
        labels = np.full((rows, row.length), IGNORED, np.int64)
        begins = np.flatnonzero(positions == 0)[: max(1, round(row.pairs))]
        labels[:, begins] = random.integers(0, 2, (rows, len(begins)))
    decoder = None
    if row.decoder_length:
        decoder = np.tile(_laid_out(row.decoder_length, row.documents)[0], (rows, 1))
    return Batch(
        random.integers(0, config.vocab_size, (rows, row.length)),
        targets,
        np.tile(positions, (rows, 1)),
        np.tile(document, (rows, 1)),
        segments=np.zeros((rows, row.length), np.int64) if row.pairs else None,
        labels=labels,
        decoder_tokens=random.integers(0, config.vocab_size, (rows, written))
        if decoder is not None
        else None,
        decoder_document=decoder,
    )


def _laid_out(length: int, documents: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of documents of about equal length that share a row, and positions in them; both (length,)."""
    count = min(max(round(documents), 1), length)
    document = np.arange(length) * count // length
    begins = np.searchsorted(document, np.arange(count))
    return document, np.arange(length) - begins[document]


class _PeakMemory:
    """How far memory grows inside the block: of the process on a CPU, of torch's tensors on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.bytes = device, 0
        self._done = threading.Event()

    def __enter__(self) -> _PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = self._highest = resident_memory()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, resident_memory())

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._done.set()
        self._thread.join()
        self.bytes = max(self._highest, resident_memory()) - self._before
