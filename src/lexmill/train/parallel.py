"""How a model is spread over processes: a copy in each (DDP), or a part in each (FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lexmill.model.stack import Stack
from lexmill.train.batches import Batch
from lexmill.train.cross_entropy import fused_softmax
from lexmill.train.examples import IGNORED
from lexmill.train.objective import Objective
from lexmill.train.processes import Processes

Sharding = Literal["replicate", "shard"]
# A block is compiled once for each of: the first or a later one, packed rows or not, all rows or the last few
# of an epoch, learning or not. torch's own limit of 8 is below that.
_VARIANTS = 64


class Task(nn.Module):
    """A model with its objective as one forward call, which is what torch's wrappers follow."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.fused = False  # see `fused_softmax`

    def forward(self, batch: Batch, scales: dict[str, float]) -> Tensor:
        """The weighted sum of what was lost.

        Args:
            scales: what each kind's sum is multiplied by, usually 1 / its targets in the whole step.
        """
        with fused_softmax(self.fused):
            losses = self.objective(self.model, batch)
        parts = [
            value * (losses.weights.get(name, 1.0) * scales[name])
            for name, value in losses.sums.items()
            if name in scales
        ]
        return torch.stack(parts).sum()


def recompute_blocks(model: nn.Module, recompute: bool) -> None:
    """Have training compute the inside of each block again on the way back, or keep it."""
    for part in model.modules():
        if isinstance(part, Stack):
            part.recompute = recompute


def spread(task: Task, processes: Processes, sharding: Sharding, compiled: bool = False) -> nn.Module:
    """The task as all processes run it together.

    "replicate" keeps the whole model in each process; gradients are averaged while the backward
    pass still runs. "shard" keeps of each block's weights, gradients and optimiser state only this
    process's part, and gathers a block when it is its turn (Zhao et al. 2023, "PyTorch FSDP").

    Args:
        compiled: let torch.compile fuse each block, and the softmax over the vocabulary; on GPUs only.
    """
    task.to(processes.device)
    if compiled and processes.device.type == "cuda":
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
        task.fused = True
        for block in _blocks(task):
            block.compile()
    if not processes.group:
        return task
    if sharding == "shard":
        from torch.distributed.fsdp import fully_shard

        for part in (*_blocks(task), task):
            fully_shard(part)
        return task
    # a step without pairs leaves the pair head without a gradient, and texts that are embedded any pooler
    unused = hasattr(task.model, "nsp") or (
        hasattr(task.model, "pooler") and not hasattr(task.model, "label")
    )
    return nn.parallel.DistributedDataParallel(
        # the only buffers are a quantised base, which is the same everywhere
        task,
        find_unused_parameters=unused,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


def uncompiled() -> Any:
    """A context in which blocks that were compiled run as they are written."""
    return torch.compiler.set_stance("force_eager")


def _blocks(task: Task) -> list[nn.Module]:
    return [module for name, module in task.named_modules() if name.split(".")[-2:-1] == ["blocks"]]


def synchronised(task: nn.Module, last: bool) -> Any:
    """A context for one part of a step: processes exchange gradients in the last one only."""
    if isinstance(task, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext() if last else task.no_sync()
    part: Any = task
    if hasattr(part, "set_requires_gradient_sync"):
        part.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


@contextlib.contextmanager
def gathered(task: nn.Module) -> Iterator[None]:
    """The model outside of a step, whole enough to be called by its own methods."""
    part: Any = task if hasattr(task, "unshard") else None  # FSDP's own, once a model is sharded
    if part is not None:
        part.unshard()
    try:
        yield
    finally:
        if part is not None:
            part.reshard()


def own_parts(batch: Batch, processes: Processes, micro_rows: int | None) -> list[Batch]:
    """This process's rows of a step, in parts of at most `micro_rows`; as many parts in each process.

    Every process draws the same step and takes each `world`-th row, so the order of the data does
    not depend on how many there are. Where rows run out, a row without targets stands in.
    """
    rows = np.arange(processes.rank, len(batch.tokens), processes.world)
    most = -(-len(batch.tokens) // processes.world)
    size = micro_rows or most
    parts = []
    for start in range(0, most, size):
        chosen = rows[start : start + size]
        part = batch.select(chosen if len(chosen) else np.array([0]))
        if not len(chosen):
            part.targets[:] = IGNORED
            if part.labels is not None:
                part.labels[:] = IGNORED
        parts.append(part.to(processes.device))
    return parts
