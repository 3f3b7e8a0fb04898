"""One run on one process or on many (torch.distributed, started by torchrun)."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lexmill.devices import process_count
from lexmill.errors import ConfigError, TrainingError

T = TypeVar("T")
# Others wait while the first process prepares data or trains a tokenizer, which can take hours.
_PATIENCE = datetime.timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together.

    Attributes:
        rank: which one this is, from 0.
        world: how many there are.
        device: where this one computes.
        group: whether torchrun started them. Its only process goes the way of many too.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: bool = False

    @classmethod
    def join(cls, device: str = "auto", *, deterministic: bool = False) -> Processes:
        """Meet the other processes that torchrun started, if it did; else be the only one.

        Args:
            device: "auto" takes a GPU where torch can use one.
            deterministic: let a GPU add up in one order only, for all of this process.

        Raises:
            ConfigError: a device that is not there.
        """
        chosen = find_device(device)
        if deterministic and chosen.type == "cuda":
            # cuBLAS reads it when the first product is made
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            settings: Any = torch.utils.deterministic
            settings.fill_uninitialized_memory = False  # nothing here reads what it did not write
        if process_count() == 1 and not dist.is_torchelastic_launched():
            return cls(device=chosen)
        if not dist.is_initialized():
            # with GPUs both: a step of the recipe may be told to compute on the CPU
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=_PATIENCE)
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size(), chosen, group=True)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.group:
            dist.barrier()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block before all others do: it makes files that they only open."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def sums(self, *values: float) -> list[float]:
        """Each value added up over all processes."""
        if not self.group:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def as_first_says(self, value: T) -> T:
        """What the first process has for `value`."""
        if not self.group:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    @contextlib.contextmanager
    def explain_loss_of_others(self) -> Iterator[None]:
        """Say in plain words that another process ended, where torch speaks of sockets or torchrun of signals."""
        if not self.group:
            yield
            return
        with self._ended_by_torchrun():
            try:
                yield
            except RuntimeError as error:
                said = str(error).lower()
                if not any(word in said for word in ("closed by peer", "reset by peer", "gloo", "nccl")):
                    raise
                raise self._lost_others() from error

    @contextlib.contextmanager
    def _ended_by_torchrun(self) -> Iterator[None]:
        """SIGTERM is how torchrun ends those that remain, often before the connection tells of the loss."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(number: int, frame: FrameType | None) -> None:
            raise self._lost_others()

        before = signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _lost_others(self) -> TrainingError:
        return TrainingError(
            f"Process {self.rank} of {self.world} lost the others: one of them was stopped or failed.",
            "Its own message tells why. The same command goes on from the last checkpoint, "
            "with as many processes or with another number.",
        )


def _leave() -> None:
    # what still holds the group keeps its threads alive; one that drops a tensor while Python ends aborts
    gc.collect()
    with contextlib.suppress(Exception):  # others may be gone already
        dist.destroy_process_group()


def find_device(asked: str) -> torch.device:
    """Where this process computes: "auto" takes a GPU where torch can use one.

    Raises:
        ConfigError: a device that is not there.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no GPU.", "Set device = 'cpu' or 'auto'.")
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"There are more processes on this machine than its {torch.cuda.device_count()} GPUs.",
            "Start as many with torchrun --nproc-per-node.",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
