"""What looks wrong while a model trains: losses that jump, and numbers that are none."""

from __future__ import annotations

import math
from collections import deque

_WINDOW = 50  # steps that a loss is compared with
_DEVIATIONS = 6.0
_LEAST = 0.3  # nats above the mean: less is no spike however even the losses were
_NEW_LEVEL = 5  # spikes in a row are told; then that is where the loss is now


class LossWatch:
    """Remembers recent losses and tells which one stands out."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._in_a_row = 0
        self.smooth = math.nan

    def is_spike(self, loss: float) -> bool:
        """Take in a loss; whether it lies far above the last fifty.

        A spike does not count among those that the next is compared with, until five have come in a row:
        a loss that has jumped and stays there is not news at each step.
        """
        if not math.isfinite(loss):
            return False
        if len(self._recent) == _WINDOW:
            mean = sum(self._recent) / _WINDOW
            deviation = math.sqrt(sum((one - mean) ** 2 for one in self._recent) / _WINDOW)
            if loss > mean + max(_DEVIATIONS * deviation, _LEAST):
                self._in_a_row += 1
                if self._in_a_row <= _NEW_LEVEL:
                    return True
                self._recent.clear()
        self._in_a_row = 0
        self._recent.append(loss)
        self.smooth = loss if math.isnan(self.smooth) else 0.9 * self.smooth + 0.1 * loss
        return False

    @property
    def usual(self) -> float:
        """The mean of the recent losses."""
        return sum(self._recent) / max(len(self._recent), 1)
