"""How far a classifier's probabilities can be trusted, and the one number that mends them.

Guo et al. 2017, "On Calibration of Modern Neural Networks": logits are divided by a temperature that is chosen on
held-out rows. Which label is the likeliest does not change.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_BINS = 15  # as in the paper
_LOWEST, _HIGHEST = 0.05, 20.0


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities, (n, labels), float64."""
    scores = logits.astype(np.float64) / temperature
    scores -= scores.max(-1, keepdims=True)
    shares = np.exp(scores)
    return shares / shares.sum(-1, keepdims=True)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature at which these labels are the most probable, between 0.05 and 20.

    Args:
        logits: (n, labels).
        labels: (n,) the right ones.
    """
    right = logits[np.arange(len(labels)), labels].astype(np.float64)

    def slope(inverse: float) -> float:
        """Of the mean loss, by 1 / temperature: the loss is convex in it."""
        return float(((softmax(logits, 1 / inverse) * logits).sum(-1) - right).mean())

    low, high = 1 / _HIGHEST, 1 / _LOWEST
    if slope(low) >= 0:
        return _HIGHEST
    if slope(high) <= 0:
        return _LOWEST
    for _ in range(60):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(1 / np.sqrt(low * high))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error: how far confidence and accuracy lie apart, on average over 15 equal bins."""
    sure = probabilities.max(-1)
    right = probabilities.argmax(-1) == labels
    bins = np.clip(np.ceil(sure * _BINS).astype(int) - 1, 0, _BINS - 1)
    error = 0.0
    for number in range(_BINS):
        inside = bins == number
        if inside.any():
            error += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    return float(error)


def calibrate(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The temperature for held-out rows, and what it does to the calibration error on them."""
    temperature = fit_temperature(logits, labels)
    return {
        "temperature": round(temperature, 5),
        "rows": len(labels),
        "error_before": round(calibration_error(softmax(logits), labels), 5),
        "error_after": round(calibration_error(softmax(logits, temperature), labels), 5),
    }
