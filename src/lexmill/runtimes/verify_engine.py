"""lexmill's own engine as one more runtime of `verify`: its logits and its greedy texts against those of torch.

Tokenizer and template are lexmill's own on both sides, so they are not asked again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.inference.language_model import LanguageModel, load
from lexmill.inference.native.library import available
from lexmill.inference.sampling import log_softmax
from lexmill.model.directory import ModelDirectory
from lexmill.runtimes.verify_checks import Comparison
from lexmill.runtimes.verify_reference import Reference
from lexmill.runtimes.verify_report import Check
from lexmill.runtimes.verify_tolerances import TOLERANCES, exact_tolerance, tolerance_of


class EngineRuntime:
    """A model in the engine: what `Comparison` asks of it.

    Args:
        written: answer as where the model has written a text itself, behind the prompt of the last greedy text or
            behind the first token; else as where all was given. The engine multiplies the two in different ways.
    """

    def __init__(self, model: LanguageModel, *, written: bool = True) -> None:
        self.model, self._written = model, written
        self._prompt: list[int] = []

    def logprobs(self, prompts: Sequence[Sequence[int]], vocabulary: int) -> np.ndarray:
        """Log-probabilities of what follows each: (prompts, vocabulary)."""
        return log_softmax(np.stack([self._last(list(ids)) for ids in prompts]))

    def _last(self, ids: list[int]) -> np.ndarray:
        with self.model.backend.rows() as session:
            begun = self._prompt and ids[: len(self._prompt)] == self._prompt
            given = len(self._prompt) if begun else 1
            if not self._written or len(ids) <= given:
                return session.read_rows([ids])[0]
            session.read_rows([ids[:given]])
            return session.read_rows([ids[given:]])[0]

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """A greedy continuation."""
        self._prompt = list(ids)
        return self.model.generate_ids(ids, max_tokens=max_tokens)


@contextlib.contextmanager
def open_engine(path: Path) -> Iterator[EngineRuntime]:
    """A model directory or a GGUF file in the engine."""
    model = load(path, backend="native")
    try:
        yield EngineRuntime(model)
    finally:
        model.close()


def has_engine(shape: str) -> bool:
    """Whether the engine is built and its answers of this shape are compared."""
    return shape == "decoder" and available()


def reference_of_directory(reference: Reference, directory: ModelDirectory) -> tuple[Reference, Any]:
    """lexmill's side for a model directory in the engine, and the tolerance.

    Weights of 16 bits are multiplied with activations of 16 bits; what that costs is measured, as for files.
    """
    weights = directory.weights()
    types = {own: directory.weight_dtype(own) for own in weights}
    if set(types.values()) == {"F32"}:
        return reference, exact_tolerance(reference.spread)
    rounding = reference.with_weights(weights, types, {})
    return rounding, tolerance_of(rounding.noise) if rounding.noise else TOLERANCES["bf16"]


def compare_engine(name: str, runtime: Any, reference: Reference, tolerance: Any) -> Iterator[Check]:
    """The checks of the engine; it rounds less than other runtimes do, so how it rounds is not compared."""
    if tolerance is not None:
        tolerance = dataclasses.replace(tolerance, rounded_tie=math.inf)
    as_given: Any = EngineRuntime(runtime.model, written=False)  # of the questions there are it is asked some
    given = Comparison(name, as_given, reference, tolerance)
    yield dataclasses.replace(given.logits(), check="prompt logits")
    written = Comparison(name, runtime, reference, tolerance)
    yield written.logits()
    yield written.greedy()
