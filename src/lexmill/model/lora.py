"""LoRA as a wrapper of a linear layer: what the layer gives, plus what two thin matrices make of the same input."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.adapter import Adapter, LoraConfig, LowRank
from lexmill.model.names import LinearLayer, linear_layers
from lexmill.model.quantised import replace_module
from lexmill.model.spreading import whole
from lexmill.model.transformer import Transformer


class LoraLinear(nn.Module):
    """base(x) + scale · B (A dropout(x)); only A and B learn (Hu et al. 2021).

    Args:
        base: a linear layer, kept as it is.
        a: (rank, inputs); shared by layers that Hugging Face holds as one.
        b: (outputs, rank).
    """

    def __init__(
        self, base: nn.Module, a: nn.Parameter, b: nn.Parameter, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.base, self.lora_a, self.lora_b = base, a, b
        self.scale, self.dropout = scale, dropout
        self.off = False  # compute as the base does; see `without_adapter`

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return self.base(x)
        seen = F.dropout(x, self.dropout) if self.training and self.dropout else x
        return self.base(x) + F.linear(F.linear(seen, self.lora_a) * self.scale, self.lora_b)

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs): the merged weight, for who multiplies with it himself, as the loss does with a head's."""
        if self.off:
            return self.base.weight  # type: ignore[return-value]
        return self.base.weight + self.scale * (self.lora_b @ self.lora_a)  # type: ignore[operator]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]


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
