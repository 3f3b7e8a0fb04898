"""What the three shapes share: their weights, under the names of the tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.beginning import begin_weights
from lexmill.model.config import ModelConfig
from lexmill.model.names import weight_names
from lexmill.model.spreading import whole
from lexmill.model.vector_math import settle_vector_math


class Transformer(nn.Module):
    """A model with an embedding and an output projection, tied or not."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        settle_vector_math()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)

    def add_head(self) -> None:
        """An output projection of its own where the embedding does not serve as one."""
        if not self.config.tied:
            self.head = nn.Linear(self.config.width, self.config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, width): the embedding itself when tied."""
        return self.embed.weight if self.config.tied else self.head.weight

    def drop(self, x: Tensor) -> Tensor:
        """Dropout on embeddings, in training."""
        return F.dropout(x, self.config.dropout) if self.training and self.config.dropout else x

    def initialise(self, seed: int) -> None:
        """Fresh weights, the same for the same seed on every machine (`lexmill.model.beginning`)."""
        begin_weights(dict(self.named_parameters()), self.config, seed)

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Copy in every weight by its own name; shapes must fit."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name in weight_names(self.config):
                parameters[name.own].copy_(torch.from_numpy(np.array(weights[name.own], dtype=np.float32)))

    def weights(self) -> dict[str, np.ndarray]:
        """Every weight by its own name, float32, as copies; of a model spread over processes, gathered in each."""
        parameters = dict(self.named_parameters())
        return {
            name.own: whole(parameters[name.own].detach()).to("cpu", torch.float32).numpy().copy()
            for name in weight_names(self.config)
        }
