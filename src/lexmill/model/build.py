"""From a configuration to a model."""

from __future__ import annotations

from lexmill.model.config import ModelConfig
from lexmill.model.decoder import Decoder
from lexmill.model.encoder import Encoder
from lexmill.model.encoder_decoder import EncoderDecoder
from lexmill.model.transformer import Transformer

_SHAPES: dict[str, type[Transformer]] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "encoder_decoder": EncoderDecoder,
}


def build_model(config: ModelConfig) -> Transformer:
    """A model of this shape; its weights are still to be initialised or loaded."""
    return _SHAPES[config.shape](config)
