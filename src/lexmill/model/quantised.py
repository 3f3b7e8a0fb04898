"""Linear layers whose weights stay in 8 or 4 bits and are decoded each time they are multiplied with.

For training adapters on a base that would not fit in float32 (Dettmers et al. 2023, "QLoRA"). Blocks are
GGUF's, written by `lexmill.formats.blocks`; they are decoded by torch, on whatever device they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lexmill.config import suggest
from lexmill.errors import ConfigError
from lexmill.formats.blocks import BLOCK_TYPES, BlockType, encode
from lexmill.model.adapter import QUANTISED_TYPES
from lexmill.model.build import build_model, set_weight
from lexmill.model.config import ModelConfig
from lexmill.model.names import matrices_in_blocks, weight_names
from lexmill.model.transformer import Transformer


def _scales(blocks: Tensor, start: int) -> Tensor:
    """The half-precision number at byte `start` of each block, as float32, (rows, blocks, 1)."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """16 bytes to 32 numbers from 0 to 15: low halves first, (rows, blocks, 32)."""
    return torch.cat([packed & 15, packed >> 4], -1).float()


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[..., 2:].view(torch.int8).float().mul_(_scales(blocks, 0))


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[..., 2:]).sub_(8).mul_(_scales(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[..., 4:]).mul_(_scales(blocks, 0)).add_(_scales(blocks, 2))


# Each takes blocks (rows, blocks, bytes of one), uint8, and gives float32 (rows, blocks, 32).
_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {"q8_0": _q8_0, "q4_1": _q4_1, "q4_0": _q4_0}
assert set(_DECODERS) == set(QUANTISED_TYPES)


def quantised_type(name: str) -> BlockType:
    """The type of that name.

    Raises:
        ConfigError: weights cannot be kept in it.
    """
    if name.lower() not in QUANTISED_TYPES:
        raise ConfigError(f"A base cannot be kept in '{name}'.", suggest(name, QUANTISED_TYPES))
    return BLOCK_TYPES[name.upper()]


class QuantisedLinear(nn.Module):
    """A linear layer that does not learn. Gradients pass to its input only.

    Args:
        weight: (outputs, inputs) float32; inputs divide into blocks.
        bias: (outputs,) or None.
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None, kind: BlockType) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind = kind.name.lower()
        blocks = torch.from_numpy(encode(weight, kind)).view(len(weight), -1, kind.block_bytes)
        # not part of a state: it is the base's, and the base does not change
        self.register_buffer("blocks", blocks, persistent=False)
        self.bias: nn.Parameter | None = None
        if bias is not None:
            self.bias = nn.Parameter(torch.from_numpy(np.array(bias)), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs) float32, decoded anew."""
        return _DECODERS[self.kind](self.get_buffer("blocks")).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        out = _Product.apply(x.to(dtype), self)
        return out if self.bias is None else out + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ. W is decoded for the product and forgotten; on the way back it is decoded again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            return x @ layer.weight.to(x.dtype).mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient @ ctx.layer.weight.to(gradient.dtype), None


def build_quantised(
    config: ModelConfig, weights: Mapping[str, np.ndarray], type: str
) -> tuple[Transformer, list[str]]:
    """A model whose linear layers inside blocks are kept in `type`; all else is float32.

    Never more than one weight is there in float32 beside what stays: `weights` may decode on demand.

    Args:
        weights: every weight by our name, float32.
        type: one of `QUANTISED_TYPES`.

    Returns:
        The model, and the names of layers whose rows do not divide into blocks and stay float32.

    Raises:
        ConfigError: another type.
    """
    kind = quantised_type(type)
    with torch.device("meta"):
        model = build_model(config)
    inside = matrices_in_blocks(config)
    whole = []
    for name in weight_names(config):
        place = name.own.rpartition(".")[0]
        if name.own in inside:
            weight = np.asarray(weights[name.own], np.float32)
            if kind.fits(weight.shape):
                bias = getattr(model.get_submodule(place), "bias", None)
                values = None if bias is None else np.asarray(weights[f"{place}.bias"], np.float32)
                replace_module(model, place, QuantisedLinear(weight, values, kind))
                continue
            whole.append(place)
        if not isinstance(model.get_submodule(place), QuantisedLinear):  # else its bias is there
            set_weight(model, name.own, weights[name.own])
    return model, whole


def replace_module(model: nn.Module, place: str, module: nn.Module) -> None:
    """Put `module` where the one at the path `place` is."""
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
