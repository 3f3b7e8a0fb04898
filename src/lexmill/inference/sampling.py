"""From logits to one token: the probability distribution, its filters, and the draw.

What is written here in NumPy says what is meant; where the engine is built, its compiled code does the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lexmill.errors import ConfigError, ModelError
from lexmill.inference.native.choosing import CHOOSE, Chosen


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. Temperature 0 is greedy: always the most probable.

    They apply in this order: penalties, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_k: int = 0  # keep the k most probable; 0 keeps all
    top_p: float = 1.0  # keep the most probable that together reach p (Holtzman et al. 2020)
    min_p: float = 0.0  # keep what has at least min_p times the probability of the best
    repetition_penalty: float = 1.0  # over the whole text so far (Keskar et al. 2019)
    presence_penalty: float = 0.0  # taken from the logit of what was written before
    frequency_penalty: float = 0.0  # the same, for each time that it was written
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
            "presence_penalty": (math.isfinite(self.presence_penalty), "a number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a number"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
        }
        for name, (fine, wanted) in checks.items():
            if not fine:
                raise ConfigError(f"{name} must be {wanted}, but is {getattr(self, name)}.")

    @property
    def penalises(self) -> bool:
        """Whether what stands in the text matters."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def penalise(logits: np.ndarray, seen: Sequence[int], given: int, config: SamplingConfig) -> np.ndarray:
    """Make what stands in the text less likely.

    Args:
        seen: ids of the text so far; the first `given` are the prompt's, for which only repetition counts.
    """
    if not config.penalises or not len(seen):
        return logits
    logits = logits.copy()
    if config.repetition_penalty != 1.0:  # positive logits are divided, negative ones multiplied
        ids, penalty = np.unique(np.asarray(seen)), config.repetition_penalty
        logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    ids, counts = np.unique(np.asarray(seen[given:], np.int64), return_counts=True)
    logits[ids] = logits[ids] - (config.presence_penalty + config.frequency_penalty * counts)
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
    logits: np.ndarray,
    seen: Sequence[int],
    config: SamplingConfig,
    random: np.random.Generator,
    *,
    given: int = 0,
    allowed: np.ndarray | None = None,
    best: int = 0,
) -> Chosen:
    """The next token.

    Args:
        logits: (vocab_size,).
        seen: the ids of the text so far, for the penalties; the first `given` are the prompt's.
        allowed: uint32, a bit a token: what may be chosen at all. None: everything.
        best: tell the log-probabilities, by the logits as they are, of so many of the likeliest.

    Raises:
        ModelError: the logits are no numbers.
        ValueError: nothing is allowed.
    """
    if config.temperature == 0 and allowed is None and not best and not (config.penalises and len(seen)):
        chosen = Chosen(int(logits.argmax()))  # which finds no number first, if there is one
        if np.isfinite(logits[chosen.token]):
            return chosen
    uniform = random.random() if config.temperature else 0.0
    if CHOOSE is not None:
        chosen = CHOOSE(logits, seen, given, config, uniform, allowed, best)
    else:
        chosen = choose_in_numpy(logits, seen, given, config, uniform, allowed, best)
    if chosen.token == -1:
        raise ValueError("no token is allowed")
    if chosen.token < 0:
        raise ModelError("The model gives logits that are no numbers.", "Its weights are damaged.")
    return chosen


def choose_in_numpy(
    logits: np.ndarray,
    seen: Sequence[int],
    given: int,
    config: SamplingConfig,
    uniform: float,
    allowed: np.ndarray | None,
    best: int,
) -> Chosen:
    """What the compiled code does (`lexmill.inference.native.choosing.Chooser`)."""
    changed = penalise(np.asarray(logits, np.float32), seen, given, config)
    if allowed is not None:
        bits = np.unpackbits(allowed.astype("<u4").view(np.uint8), count=len(changed), bitorder="little")
        changed = np.where(bits, changed, -np.inf)
    highest = changed.max()
    if highest == -np.inf:
        return Chosen(-1 if allowed is not None else -2)
    if not np.isfinite(highest):
        return Chosen(-2)
    if config.temperature == 0:
        token = int(changed.argmax())
    else:
        cumulative = np.cumsum(distribution(changed, config))
        token = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    if not best:
        return Chosen(token)
    logprobs = log_softmax(logits)
    ranked = np.argsort(-logprobs, kind="stable")[:best]
    return Chosen(token, float(logprobs[token]), tuple((int(one), float(logprobs[one])) for one in ranked))
