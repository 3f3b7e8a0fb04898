"""Checkpoints of a model that is spread over processes: each writes its own part (torch.distributed.checkpoint).

The parts are safetensors files; no pickle is written or read. They load again on any number of
processes, one included.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lexmill.errors import MissingPackageError
from lexmill.train.optimizers import OptimizerSet


def save_shards(folder: Path, model: nn.Module, optimizers: OptimizerSet) -> None:
    """Write this process's part of weights and optimiser state; to be called in all processes at once."""
    import torch.distributed.checkpoint as dcp

    storage = _storage()
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            _tensors(model, optimizers),
            storage_writer=storage.HuggingFaceStorageWriter(path=str(folder), save_distributed=True),
        )


def load_shards(folder: Path, model: nn.Module, optimizers: OptimizerSet) -> None:
    """Read this process's part, whatever the number of processes that wrote."""
    import torch.distributed.checkpoint as dcp

    storage = _storage()
    optimizers.begin_state()
    tensors = _tensors(model, optimizers)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=storage.HuggingFaceStorageReader(str(folder)))


def _tensors(model: nn.Module, optimizers: OptimizerSet) -> dict[str, torch.Tensor]:
    learned = ((name, one) for name, one in model.named_parameters() if one.requires_grad)
    weights = {f"model/{name}": parameter.detach() for name, parameter in learned}
    return weights | {f"optimizer/{name}": value for name, value in optimizers.tensors().items()}


def _storage() -> Any:
    try:
        import safetensors  # noqa: F401
        from torch.distributed.checkpoint import hf_storage
    except ImportError as error:
        raise MissingPackageError(
            "safetensors", "to write checkpoints of sharded models", "parallel"
        ) from error
    return hf_storage
