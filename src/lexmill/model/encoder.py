"""The encoder: every position sees the whole text; heads for masked words and for next sentences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmill.model.config import ModelConfig
from lexmill.model.mlp import ACTIVATIONS
from lexmill.model.norms import make_norm
from lexmill.model.scope import Record
from lexmill.model.stack import Stack
from lexmill.model.transformer import Transformer


class Transform(nn.Module):
    """A layer between the hidden states and a head's projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width, bias=config.mlm_bias)
        self.norm = make_norm(config)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(hidden)))


class MaskedHead(Transform):
    """From hidden states to what the output projection reads; `bias` is that projection's own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class Encoder(Transformer):
    """BERT's shape (Devlin et al. 2019), or by flags ModernBERT's (Warner et al. 2024)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.positions == "learned":
            self.position_embed = nn.Embedding(config.context, config.width)
        if config.segments:
            self.segment_embed = nn.Embedding(config.segments, config.width)
        self.embed_norm = make_norm(config)
        self.encoder = Stack(config, config.layers, causal=False)
        if config.mlm:
            self.mlm = MaskedHead(config)
            self.add_head()
        if config.pooler:
            self.pooler = nn.Linear(config.width, config.width)
        if config.nsp:
            self.nsp = nn.Linear(config.width, 2)
        if (config.labels or config.span) and config.family == "modernbert":
            self.transform = Transform(config)
        if config.labels:
            self.label = nn.Linear(config.width, len(config.labels))
        if config.span:
            self.span = nn.Linear(config.width, 2)

    def hidden(
        self,
        tokens: Tensor,  # (batch, time)
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """The last hidden states: (batch, time, width).

        Args:
            positions: (batch or 1, time); counted from 0 when not given.
            mask: as in `Scope`: packed or padded rows.
            segments: (batch, time): 0 for the first text of a pair, 1 for the second; all 0 when not given.
            record: receives each layer's hidden states and attention weights.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.embed(tokens)
        if self.config.segments:
            x = x + self.segment_embed(torch.zeros_like(tokens) if segments is None else segments)
        if self.config.positions == "learned":
            x = x + self.position_embed(positions)
        return self.encoder(self.drop(self.embed_norm(x)), positions, mask, record=record)

    def masked_logits(self, hidden: Tensor) -> Tensor:
        """What stands at each place, by the masked-language-modelling head: (…, vocab_size)."""
        return F.linear(self.mlm(hidden), self.head_weight, self.mlm.bias)

    def pooled(self, first: Tensor) -> Tensor:
        """The hidden state of a first token, (…, width), as the pair's summary, (…, width)."""
        return torch.tanh(self.pooler(first))

    def pair_logits(self, first: Tensor) -> Tensor:
        """From the hidden state of the first token: [follows, does not follow], (…, 2)."""
        return self.nsp(self.pooled(first))

    def label_logits(self, summary: Tensor) -> Tensor:
        """How well each label fits, (…, labels).

        Args:
            summary: (…, width): the hidden state of the first token, or with `label_pooling = "mean"` the
                mean of a text's.
        """
        below = self.pooled(summary) if self.config.pooler else self.transform(summary)
        return self.label(self.drop(below))

    def span_logits(self, hidden: Tensor) -> Tensor:
        """How well an answer begins and ends at each token: (…, 2)."""
        transform = getattr(self, "transform", None)
        return self.span(hidden if transform is None else self.drop(transform(hidden)))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Logits of the masked-language-modelling head: (batch, time, vocab_size)."""
        return self.masked_logits(self.hidden(tokens, positions, mask, segments, record))
