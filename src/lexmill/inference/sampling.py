"""From logits to one token: the probability distribution, its filters, and the draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lexmill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. Temperature 0 is greedy: always the most probable.

    The filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_k: int = 0  # keep the k most probable; 0 keeps all
    top_p: float = 1.0  # keep the most probable that together reach p (Holtzman et al. 2020)
    min_p: float = 0.0  # keep what has at least min_p times the probability of the best
    repetition_penalty: float = 1.0  # over the whole text so far (Keskar et al. 2019)
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0 and math.isfinite(self.temperature), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (
                self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
                "positive",
            ),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
        }
        for name, (fine, wanted) in checks.items():
            if not fine:
                raise ConfigError(f"{name} must be {wanted}, but is {getattr(self, name)}.")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def penalise_repetition(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """Make what has been said less likely: positive logits divided, negative ones multiplied by `penalty`."""
    if penalty == 1.0 or not len(seen):
        return logits
    logits = logits.copy()
    ids = np.unique(np.asarray(seen))
    logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return logits


def distribution(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The probabilities that are drawn from, (vocab_size,), float64, after temperature and filters."""
    if config.temperature == 0:
        chosen = np.zeros(len(logits))
        chosen[int(logits.argmax())] = 1.0
        return chosen
    # subtracting the maximum first: a tiny temperature may not overflow
    with np.errstate(over="ignore"):  # minus infinity is the right answer
        scaled = (logits.astype(np.float64) - float(logits.max())) / config.temperature
    probabilities = np.exp(log_softmax(scaled))
    order = np.argsort(-probabilities, kind="stable")
    keep = np.ones(len(order), bool)
    if config.top_k:
        keep[config.top_k :] = False
    if config.top_p < 1:
        ranked = np.where(keep, probabilities[order], 0.0)
        ranked /= ranked.sum()
        keep &= np.cumsum(ranked) - ranked < config.top_p
    if config.min_p > 0:
        keep &= probabilities[order] >= config.min_p * probabilities[order[0]]
    keep[0] = True
    filtered = np.zeros_like(probabilities)
    filtered[order[keep]] = probabilities[order[keep]]
    return filtered / filtered.sum()


def choose(
    logits: np.ndarray, seen: Sequence[int], config: SamplingConfig, random: np.random.Generator
) -> int:
    """The id of the next token.

    Args:
        logits: (vocab_size,).
        seen: the ids of the text so far, for the repetition penalty.
    """
    logits = penalise_repetition(logits, seen, config.repetition_penalty)
    if config.temperature == 0:
        return int(logits.argmax())
    cumulative = np.cumsum(distribution(logits, config))
    return int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
