"""Rotary positions for longer texts than a model was first trained on: three ways to turn more slowly. Free of torch.

Linear (Chen et al. 2023): every pair of coordinates turns slower by one factor. Llama 3.1's: only pairs
that turn slowly, with a ramp between. YaRN (Peng et al. 2023): a ramp over the pairs, and larger scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lexmill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions are stretched. What a kind does not use stays at its default."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float  # a pair that is stretched wholly turns so many times slower
    original_context: int = 0  # tokens of the training before (llama3, yarn)
    low_turns: float = 1.0  # llama3: pairs that turn fewer times in that context are stretched wholly
    high_turns: float = 4.0  # llama3: those that turn more often not at all
    beta_fast: float = 32.0  # yarn: the same, in turns
    beta_slow: float = 1.0
    attention: float | None = None  # yarn: cosines and sines times this; None: by the factor

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ConfigError(f"There is no rotary scaling '{self.kind}'.")
        numbers = ("factor", "low_turns", "high_turns", "beta_fast", "beta_slow")
        for name in (*numbers, *(["attention"] if self.attention is not None else [])):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"'{name}' of a rotary scaling must be positive, but is {value}.")
        if self.kind != "linear" and self.original_context < 1:
            raise ConfigError(f"Rotary scaling of the kind '{self.kind}' needs 'original_context'.")
        if self.high_turns <= self.low_turns:
            raise ConfigError(
                f"'high_turns' ({self.high_turns}) must lie above 'low_turns' ({self.low_turns})."
            )

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with; scores get its square."""
        if self.kind != "yarn":
            return 1.0
        return yarn_magnitude(self.factor) if self.attention is None else self.attention

    def frequencies(self, periods: np.ndarray, theta: float) -> np.ndarray:
        """How fast each pair turns, in radians a token: in float32 bit for bit as in transformers.

        Args:
            periods: tokens in which each pair turns by one radian without scaling, (head_width / 2,), the
                shortest first: powers of `theta`. Their precision is that of the result.
        """
        plain = 1 / periods
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "yarn":
            keep = 1 - self._yarn_ramp(len(periods), theta).astype(periods.dtype)
            return 1 / (self.factor * periods) * (1 - keep) + plain * keep
        turn = 2 * math.pi / plain  # tokens of a whole turn
        ramp = (self.original_context / turn - self.low_turns) / (self.high_turns - self.low_turns)
        between = (1 - ramp) * plain / self.factor + ramp * plain
        found = np.where(turn > self.original_context / self.low_turns, plain / self.factor, between)
        return np.where(turn < self.original_context / self.high_turns, plain, found)

    def _yarn_ramp(self, pairs: int, theta: float) -> np.ndarray:
        """0 for pairs that keep their speed, 1 for those that are stretched, float32."""

        def pair_with(turns: float) -> float:
            return pairs * math.log(self.original_context / (turns * 2 * math.pi)) / math.log(theta)

        low = max(math.floor(pair_with(self.beta_fast)), 0)
        high = min(math.ceil(pair_with(self.beta_slow)), 2 * pairs - 1)
        span = high - low or 0.001
        return np.clip((np.arange(pairs, dtype=np.float32) - low) / span, 0, 1)


def yarn_magnitude(factor: float) -> float:
    """What YaRN's paper advises for a factor."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
