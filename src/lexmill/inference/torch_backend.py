"""The torch backend: a decoder with its cache, behind the face that generation wants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lexmill.model.cache import Cache
from lexmill.model.decoder import Decoder
from lexmill.model.directory import ModelDirectory


def load_decoder(directory: ModelDirectory) -> Decoder:
    """The model of a directory, in memory, float32, ready to run."""
    decoder = Decoder(directory.config)
    decoder.load_weights(directory.weights())
    return decoder.eval()


class TorchSession:
    """One text being read and continued (`lexmill.inference.generation.Session`)."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._cache = Cache(decoder.config)
        self.context = decoder.config.context

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Read on; returns float32 logits (vocab_size,) for what follows."""
        with torch.inference_mode():
            hidden = self._decoder.hidden(torch.tensor([list(ids)]), cache=self._cache)[:, -1]
            return torch.nn.functional.linear(hidden, self._decoder.head_weight)[0].float().numpy()


def all_logits(decoder: Decoder, ids: Sequence[int]) -> np.ndarray:
    """Logits at every position of one text: (len(ids), vocab_size), float32."""
    with torch.inference_mode():
        return decoder(torch.tensor([list(ids)]))[0].float().numpy()
