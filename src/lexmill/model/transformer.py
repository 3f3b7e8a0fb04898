"""What the three shapes share: their weights, under the names of the tables, and how they begin."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.config import ModelConfig
from lexmill.model.names import weight_names

# What writes into the residual stream: begins at zero.
_WRITERS = ("attention.out.weight", "cross.out.weight", "mlp.down.weight")


class Transformer(nn.Module):
    """A model with an embedding and an output projection, tied or not."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
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
        """Fresh weights, the same for the same seed on every machine.

        Normal with deviation 1/sqrt(inputs); what writes into the residual stream begins at zero
        (each block begins as the identity), and so trains faster from the first step. Learned
        positions begin as sinusoids, see `_begin_positions`.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith(_WRITERS) or name.endswith(("bias", "relative.weight")):
                    weight.zero_()
                elif weight.dim() == 1:
                    weight.fill_(1.0)
                else:
                    embedding = name.endswith("embed.weight") or name == "head.weight"
                    learned = self.config.positions == "learned" and name in (
                        "embed.weight",
                        "segment_embed.weight",
                    )
                    small = 0.1 if learned else 0.02
                    deviation = small if embedding else weight.shape[1] ** -0.5
                    if name.endswith("attention.q.weight") and not self.config.scale_scores:
                        deviation *= self.config.head_width**-0.5
                    weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)

        if self.config.positions == "learned":
            self._begin_positions()

    def _begin_positions(self) -> None:
        """Let attention look nearby from the first step, where positions would have to be learned from nothing.

        Positions are sinusoids (Vaswani et al. 2017) over the first `head_width` features, stronger there
        than the words; in two thirds of the heads queries and keys begin as just these features, so that
        places that are alike, that is near, look at each other ("mimetic initialization", Trockman & Kolter
        2023). The other features and heads stay free for words, and to gather from afar. Without it a small
        BERT predicts by frequency alone for hundreds of steps; measured in docs/decisions.md.
        """
        parameters = dict(self.named_parameters())
        positions = parameters["position_embed.weight"]
        size = self.config.head_width
        with torch.no_grad():
            rates = 1000 ** (-torch.arange(0, size, 2).float() / size)
            angles = torch.arange(len(positions)).float()[:, None] * rates
            positions.zero_()
            positions[:, :size] = 0.4 * torch.cat([angles.sin(), angles.cos()], 1)[:, :size]
            for name, weight in parameters.items():
                if name.endswith(("attention.q.weight", "attention.k.weight")):
                    for head in weight.split(size)[: self.config.heads * 2 // 3]:
                        head.copy_(0.8 * torch.eye(size, weight.shape[1]))

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Copy in every weight by its own name; shapes must fit."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name in weight_names(self.config):
                parameters[name.own].copy_(torch.from_numpy(np.array(weights[name.own], dtype=np.float32)))

    def weights(self) -> dict[str, np.ndarray]:
        """Every weight by its own name, float32, as copies."""
        parameters = dict(self.named_parameters())
        return {
            name.own: parameters[name.own].detach().to("cpu", torch.float32).numpy().copy()
            for name in weight_names(self.config)
        }
