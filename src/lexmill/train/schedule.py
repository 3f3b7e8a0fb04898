"""How the learning rate goes over a run: up, along, and down to zero."""

from __future__ import annotations


def learning_rate_factor(step: int, total: int, warmup: int, decay: float) -> float:
    """Warm-up, plateau and linear decay (Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training").

    Args:
        step: from 0.
        total: steps of the whole run.
        warmup: steps from almost nothing to 1.
        decay: the fraction of the run, at its end, over which the factor falls to almost 0.
    """
    rise = min(1.0, (step + 1) / max(warmup, 1))
    fall = min(1.0, (total - step) / max(decay * total, 1e-9))
    return max(0.0, min(rise, fall))
