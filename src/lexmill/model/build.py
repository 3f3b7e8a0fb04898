"""From a configuration to a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import nn

from lexmill.model.config import ModelConfig
from lexmill.model.decoder import Decoder
from lexmill.model.encoder import Encoder
from lexmill.model.encoder_decoder import EncoderDecoder
from lexmill.model.names import weight_names
from lexmill.model.transformer import Transformer

_SHAPES: dict[str, type[Transformer]] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "encoder_decoder": EncoderDecoder,
}


def build_model(config: ModelConfig) -> Transformer:
    """A model of this shape; its weights are still to be initialised or loaded."""
    return _SHAPES[config.shape](config)


def build_loaded(
    config: ModelConfig, weights: Mapping[str, np.ndarray], in_bfloat16: Collection[str] = ()
) -> Transformer:
    """A model with these weights, in float32 but for those that are to lie in bfloat16.

    Weights are taken one by one, so that nothing is there twice: `weights` may read on demand.

    Args:
        weights: every weight by our name, float32.
        in_bfloat16: names of weights that will not learn.
    """
    with torch.device("meta"):
        model = build_model(config)
    for name in weight_names(config):
        set_weight(model, name.own, weights[name.own], name.own in in_bfloat16)
    return model


def set_weight(model: nn.Module, own: str, values: np.ndarray, in_bfloat16: bool = False) -> None:
    """Put a weight of the right shape where none is yet, or another one."""
    place, _, attribute = own.rpartition(".")
    weight = torch.from_numpy(np.array(values, np.float32))
    assert weight.shape == model.get_parameter(own).shape, own
    if in_bfloat16:
        weight = weight.bfloat16()
    setattr(model.get_submodule(place), attribute, nn.Parameter(weight, requires_grad=not in_bfloat16))
