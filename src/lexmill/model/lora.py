"""LoRA in a model: beginning an adapter, putting it in, reading it back. The wrapped layer is in `adapted.py`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from lexmill.model.adapted import LoraLinear
from lexmill.model.adapter import Adapter, LoraConfig, LowRank
from lexmill.model.config import ModelConfig
from lexmill.model.names import LinearLayer, linear_layers, matrices_in_blocks
from lexmill.model.quantised import replace_module
from lexmill.model.spreading import whole
from lexmill.model.transformer import Transformer


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapter, while the block runs; modules that are saved whole stay as they are."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False


def begin_adapter(model: Transformer, lora: LoraConfig, seed: int) -> Adapter:
    """A fresh adapter for a model, the same for the same seed: B is zero, so nothing changes at first.

    A is uniform within 1 / sqrt(inputs), as in PEFT. Weights of `modules_to_save` begin as the model's.

    Raises:
        ConfigError: a target that names no layer of the model.
    """
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for layer in lora.adapted(model.config):
        rank = lora.rank_of(layer.huggingface)
        a = (torch.rand(rank, layer.inputs, generator=generator) * 2 - 1) / math.sqrt(layer.inputs)
        b = np.zeros((layer.outputs, rank), np.float32)
        changes[layer.huggingface] = LowRank(a.numpy(), b, lora.scale_of(layer.huggingface, rank))
    parameters = dict(model.named_parameters())
    replaced = {own: _array(parameters[own]) for own in lora.saved(model.config)}
    return Adapter(lora, changes, replaced)


def add_adapter(model: Transformer, adapter: Adapter) -> None:
    """Put an adapter into a model. From then on the model's own weights do not learn; the adapter does.

    Raises:
        ModelError: it does not fit.
    """
    adapter.check(model.config, "The adapter")
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for own, weight in adapter.replaced.items():
        with torch.no_grad():
            parameters[own].copy_(torch.from_numpy(np.array(weight)))
        parameters[own].requires_grad_(True)
    for layer, change in _pairs(model, adapter):
        a = nn.Parameter(torch.from_numpy(np.array(change.a, np.float32)))
        start = 0
        for own, rows in zip(layer.owns, layer.rows):
            b = nn.Parameter(torch.from_numpy(np.array(change.b[start : start + rows], np.float32)))
            wrapped = LoraLinear(model.get_submodule(own), a, b, change.scale, adapter.config.dropout)
            replace_module(model, own, wrapped)
            start += rows


def frozen_matrices(lora: LoraConfig, config: ModelConfig) -> frozenset[str]:
    """Our names of the matrices inside blocks that an adapter is put on, and that no longer learn themselves."""
    adapted = {f"{own}.weight" for layer in lora.adapted(config) for own in layer.owns}
    return matrices_in_blocks(config).intersection(adapted).difference(lora.saved(config))


def _pairs(model: Transformer, adapter: Adapter) -> Iterator[tuple[LinearLayer, LowRank]]:
    for layer in linear_layers(model.config):
        if layer.huggingface in adapter.changes:
            yield layer, adapter.changes[layer.huggingface]


def read_adapter(model: Transformer, adapter: Adapter) -> Adapter:
    """The adapter that was put into a model, as it is now; gathered where the model is spread over processes."""
    changes = {}
    for layer, old in _pairs(model, adapter):
        parts = [model.get_submodule(own) for own in layer.owns]
        a = _array(parts[0].lora_a)  # type: ignore[arg-type]
        b = np.concatenate([_array(part.lora_b) for part in parts])  # type: ignore[arg-type]
        changes[layer.huggingface] = LowRank(a, b, old.scale)
    # a saved module may itself hold an adapter's base
    parameters = {name.replace(".base.", "."): value for name, value in model.named_parameters()}
    return Adapter(adapter.config, changes, {own: _array(parameters[own]) for own in adapter.replaced})


def _array(parameter: Tensor) -> np.ndarray:
    return whole(parameter.detach()).to("cpu", torch.float32).numpy().copy()
