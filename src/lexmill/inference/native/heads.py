"""The heads of encoders in NumPy: a few small products behind the engine's hidden states."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from lexmill.model.config import ModelConfig
from lexmill.model.names import weight_shapes

_erf = np.frompyfunc(math.erf, 1, 1)
_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (0.5 + 0.5 * np.asarray(_erf(x * math.sqrt(0.5)), np.float32)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


class Heads:
    """What `lexmill.model.encoder.Encoder` has above its hidden states.

    Args:
        weight: gives a weight by lexmill's name, float32.
    """

    def __init__(self, config: ModelConfig, weight: Callable[[str], np.ndarray]) -> None:
        self.config = config
        self._weight = functools.lru_cache(maxsize=None)(weight)
        self._known = weight_shapes(config)

    def masked_logits(self, hidden: np.ndarray) -> np.ndarray:
        """What stands at each place: (n, width) to (n, vocab_size)."""
        output = self._weight("embed.weight" if self.config.tied else "head.weight")
        return self._transform("mlm", hidden) @ output.T + self._weight("mlm.bias")

    def pair_logits(self, first: np.ndarray) -> np.ndarray:
        """From the first token, (width,): [follows, does not follow]."""
        return self._linear("nsp", self._pooled(first))

    def label_logits(self, hidden: np.ndarray) -> np.ndarray:
        """How well each label fits a text, (n, width) to (labels,)."""
        mean = self.config.label_pooling == "mean"
        summary = hidden.mean(0, dtype=np.float32) if mean else hidden[0]
        below = self._pooled(summary) if self.config.pooler else self._transform("transform", summary)
        return self._linear("label", below)

    def span_logits(self, hidden: np.ndarray) -> np.ndarray:
        """How well an answer begins and ends at each token: (n, width) to (n, 2)."""
        below = self._transform("transform", hidden) if "transform.dense.weight" in self._known else hidden
        return self._linear("span", below)

    def _pooled(self, first: np.ndarray) -> np.ndarray:
        return np.tanh(self._linear("pooler", first))

    def _linear(self, own: str, x: np.ndarray) -> np.ndarray:
        found = x @ self._weight(f"{own}.weight").T
        return found + self._weight(f"{own}.bias") if f"{own}.bias" in self._known else found

    def _transform(self, own: str, x: np.ndarray) -> np.ndarray:
        """A dense layer, the activation, a norm."""
        x = _ACTIVATIONS[self.config.activation](self._linear(f"{own}.dense", x))
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.config.norm_eps))
        x = x * self._weight(f"{own}.norm.weight")
        return x + self._weight(f"{own}.norm.bias") if f"{own}.norm.bias" in self._known else x
