"""How far a runtime's answers may be from lexmill's, and what that is measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """How far a runtime may be from lexmill running the same weights.

    Attributes:
        logits: the largest figure that passes: the greatest difference of a log-probability where
            `kind` is "max", the mean Kullback-Leibler divergence in nats where it is "KL".
        tie: two tokens that lexmill keeps no farther apart than this (in log-probability) may change
            places in greedy generation; never more than twice the error at that very position.
        rounding: as `logits`, against lexmill with activations rounded as the runtime rounds them.
        rounded_tie: as `tie`, by lexmill with activations so rounded; infinite where the runtime rounds otherwise.
        again: how much a gap may move between two answers of the runtime to the same question, asked as one
            prompt and token by token.
    """

    logits: float
    kind: str
    tie: float
    rounding: float = 0.0
    rounded_tie: float = 0.0
    again: float = 0.0


# Both sides compute in float32. Measured, greatest differences: 2.1e-5 in 4 layers, 3.1e-4 in 30; `exact_tolerance`.
# The others are for files that do not hold the model, on which no noise can be measured.
TOLERANCES = {
    "transformers": Tolerance(1e-4, "max", 1e-4),
    "f32": Tolerance(1e-4, "max", 1e-4),
    "f16": Tolerance(1e-5, "KL", 0.01),
    "bf16": Tolerance(3e-4, "KL", 0.05),
    **dict.fromkeys(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0"), Tolerance(3e-3, "KL", 0.2)),
    **dict.fromkeys(("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s"), Tolerance(6e-3, "KL", 0.32)),
}


class Answers(NamedTuple):
    """lexmill's log-probabilities.

    Attributes:
        logprobs: (positions, vocabulary).
        best: the two likeliest tokens of every place of every text, (places, 2).
        pairs: log-probabilities of these; where `best` was given, of those two.
    """

    logprobs: np.ndarray
    best: np.ndarray
    pairs: np.ndarray


@dataclass(frozen=True)
class Noise:
    """What rounding activations costs one model with the weights of one file.

    Attributes:
        cost: mean Kullback-Leibler divergence in nats of lexmill with rounded activations from lexmill without.
        gap: how far that moves the gap between the two likeliest tokens: 99 % of all positions, less at each.
        spread: as `cost`, of rounded once more, inputs moved by their last bit, from rounded.
        spread_gap: as `gap`, between these two.
    """

    cost: float
    gap: float
    spread: float
    spread_gap: float

    @classmethod
    def between(cls, plain: Answers, rounded: Answers, again: Answers) -> Noise:
        """Of three ways to answer the same questions."""
        return cls(
            mean_divergence(plain.logprobs, rounded.logprobs),
            gap_moves(plain.pairs, rounded.pairs),
            mean_divergence(rounded.logprobs, again.logprobs),
            gap_moves(rounded.pairs, again.pairs),
        )


def tolerance_of(noise: Noise) -> Tolerance:
    """What a runtime that rounds activations is allowed on one model and file.

    Its divergence from lexmill was 0.84 to 1.16 times what the same rounding costs within lexmill (docs/decisions.md: 5
    models of 2 to 30 layers); it may be twice that. From lexmill that rounds too it was at most half as far as a third of the
    cost plus twice the spread. Ties likewise.
    """
    return Tolerance(
        logits=min(2 * noise.cost + _FLOAT32, _MOST),
        kind="KL",
        tie=max(1.5 * noise.gap, 1e-4),
        rounding=min(noise.cost / 3 + 2 * noise.spread + _FLOAT32, _MOST),
        rounded_tie=max(1.5 * (noise.gap / 3 + noise.spread_gap), 1e-4),
        again=1.5 * noise.spread_gap,
    )


def exact_tolerance(spread: float) -> Tolerance:
    """What a runtime that computes in float32 is allowed: twelve times what the last bit of inputs changes, or 1e-4.

    On SmolLM2 transformers was at 1.8 times that and llama.cpp, whose exponentials and angles have more than one
    bit of error, at 6 times.

    Args:
        spread: the greatest change of a log-probability, within lexmill.
    """
    allowed = min(max(TOLERANCES["f32"].logits, 12 * spread), 1e-2)
    return Tolerance(allowed, "max", allowed)


_FLOAT32 = 1e-7  # nats; what sums in another order come to
_MOST = 0.1  # nats; where rounding alone costs more, nothing that follows would prove much


def mean_divergence(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence of rows of log-probabilities, in nats."""
    # a runtime's float32 softmax does not quite sum to one, which would hide divergences below 1e-6
    theirs = theirs - np.log(np.exp(theirs).sum(-1, keepdims=True))
    return max(0.0, float((np.exp(ours) * (ours - theirs)).sum(-1).mean()))


def gap_moves(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far the gap between two tokens moves, 99 % of all; (places, 2) log-probabilities on each side."""
    moved = np.abs((ours[:, 0] - ours[:, 1]) - (theirs[:, 0] - theirs[:, 1]))
    return float(np.quantile(moved, 0.99))
