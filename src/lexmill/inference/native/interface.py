"""What an engine is: it computes batches of tokens over pages of keys and values, and decides nothing.

Pages, schedules, sampling and caches live above it (`pages.py`, `scheduler.py`), products below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lexmill.model.config import ModelConfig

BLOCK = 32  # tokens whose keys and values a page holds
CHUNK = 256  # tokens that are computed at once, at most
NO_PAGE = -1  # in `Batch.tables`, where a sequence has no page


@dataclass(frozen=True, eq=False)
class Batch:
    """One step of an engine: T tokens of any number of sequences, each one's side by side and in order.

    Text that was given is computed with `prompt=True` (faster products of many tokens), what the model writes
    with `prompt=False`. Within one of the two, results are the same bits whatever else is in the batch, however
    a text is cut into chunks, and whatever the number of threads. The two differ in their last bits, which is
    why they never share a batch, and why only pages of `prompt=True` are shared between texts.

    Attributes:
        tokens: int32 (T,).
        positions: int32 (T,): each token's place in its sequence.
        rows: int32 (T,): each token's row of `tables`.
        tables: int32 (R, pages): which page holds tokens BLOCK·i … BLOCK·i + BLOCK − 1 of the row's sequence.
        wanted: int32 (W,): indices of the tokens whose logits are asked for.
        prompt: which of the two.
        memory: int32 (R,): the handle of what an encoder has read for each row; None for decoders.
    """

    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    tables: np.ndarray
    wanted: np.ndarray
    prompt: bool
    memory: np.ndarray | None = None


class Engine(Protocol):
    """A model that is ready to compute.

    Attributes:
        config: the model's shape.
        pages: how many pages of keys and values it has.
        vocab_size: how many logits a token has.
        threads: how many compute.
        context: the longest text; relative positions know no end, an engine may.
    """

    config: ModelConfig
    pages: int
    vocab_size: int
    threads: int
    context: int

    def forward(self, batch: Batch) -> np.ndarray:
        """Compute a batch: logits (W, vocab_size), float32. Writes keys and values into the rows' pages."""
        ...

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy keys and values of whole pages: (from, to) each."""
        ...

    def hidden(
        self, texts: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None = None
    ) -> list[np.ndarray]:
        """The last hidden states, of an encoder–decoder's encoder: (len(text), width) each, float32.

        Args:
            segments: 0 for the first text of a pair, 1 for the second; all 0 when not given.
        """
        ...

    def remember(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """Encoder–decoders: read texts and keep what the decoder looks at; a handle of each."""
        ...

    def forget(self, handles: Sequence[int]) -> None:
        """Free what `remember` kept."""
        ...

    def close(self) -> None:
        """Free everything; the engine computes no more."""
        ...
