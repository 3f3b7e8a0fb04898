"""Who computes for a `LanguageModel`: torch, or lexmill's own engine. Both behind one face of lists and arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from lexmill.config import suggest
from lexmill.errors import ConfigError
from lexmill.inference.beams import RowsSession
from lexmill.inference.generation import GenerationConfig, Step
from lexmill.model.config import ModelConfig
from lexmill.tokenizer.tokenizer import Tokenizer

BACKENDS = ("auto", "native", "torch")


class Backend(Protocol):
    """A model of any shape that computes.

    Attributes:
        name: "native" or "torch".
        config: the model's shape.
        room: tokens whose keys and values it can hold at once; None where memory alone decides.
    """

    name: str
    config: ModelConfig
    room: int | None

    def write(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        config: GenerationConfig,
        source: Sequence[int] | None = None,
    ) -> Iterator[Step]:
        """Generate behind a prompt, a step at a time; an encoder–decoder reads `source` first."""
        ...

    def rows(self, sources: Sequence[Sequence[int]] | None = None) -> AbstractContextManager[RowsSession]:
        """Several texts side by side, for as long as the context lasts; `sources` as above."""
        ...

    def all_logits(self, ids: Sequence[int], decoder_ids: Sequence[int] | None = None) -> np.ndarray:
        """Logits at every position: see `LanguageModel.logits`."""
        ...

    def hidden_rows(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The last hidden states of several texts, of an encoder–decoder its encoder's: (len(row), width) each."""
        ...

    def pair_logits(self, ids: Sequence[int], segments: Sequence[int]) -> np.ndarray:
        """The next-sentence head on a pair of texts: [follows, does not follow], float32."""
        ...

    def close(self) -> None:
        """Free what must not wait."""
        ...

    def head_logits(self, pairs: Sequence[Any]) -> list[np.ndarray]:
        """What the head of a task says of texts or pairs (`lexmill.tokenizer.pairs.Pair`).

        Returns:
            Of each pair (labels,), or (tokens, 2) from a head that finds answers; float32.
        """
        ...


def check_backend(name: str) -> str:
    """The name itself.

    Raises:
        ConfigError: there is no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"There is no backend '{name}'.", suggest(name, BACKENDS))
    return name
