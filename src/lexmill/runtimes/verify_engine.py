"""lexmill's own engine as one more runtime of `verify`: what it computes against what torch computes.

Tokenizer and template are lexmill's own on both sides, so they are not asked again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.inference.language_model import POOLING, LanguageModel, load
from lexmill.inference.sampling import log_softmax
from lexmill.model.directory import ModelDirectory
from lexmill.runtimes.verify_checks import Comparison
from lexmill.runtimes.verify_embeddings import same_embeddings
from lexmill.runtimes.verify_encoder import EncoderComparison
from lexmill.runtimes.verify_encoder_decoder import EncoderDecoderComparison
from lexmill.runtimes.verify_reference import Reference
from lexmill.runtimes.verify_report import Check
from lexmill.runtimes.verify_rounding import Rounded
from lexmill.runtimes.verify_tolerances import TOLERANCES, Answers, Noise, exact_tolerance, tolerance_of
from lexmill.tokenizer.pairs import read_pair


class EngineRuntime:
    """A decoder in the engine: what `Comparison` asks of it.

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


class EngineEncoder:
    """An encoder in the engine: what `EncoderComparison` asks of it about `answers`."""

    architecture = "the engine"

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.tokenize = model.tokenizer.encode

    def masked_logits(self, ids: Sequence[int]) -> np.ndarray:
        """(len(ids), vocabulary)."""
        return self.model.backend.all_logits(ids)

    def pair_logits(self, ids: Sequence[int], segments: Sequence[int]) -> np.ndarray:
        """Of the next-sentence head, (2,)."""
        return self.model.backend.pair_logits(ids, segments)

    def task_logits(self, ids: Sequence[int], segments: Sequence[int] | None) -> np.ndarray:
        """Of labels, (labels,), or of where an answer begins and ends, (2, len(ids))."""
        (found,) = self.model.backend.head_logits([read_pair(ids, segments or [0] * len(ids))])
        return found if self.model.config.labels else found.T

    def mean_hidden(self, ids: Sequence[int]) -> np.ndarray:
        """The mean of the last hidden states of a text: (width,)."""
        return self.model.backend.hidden_rows([ids])[0].mean(0)

    def mean_hidden_of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """The same of several texts at once: (texts, width)."""
        return self.model.embed(texts, pooling="mean")

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """One vector of a text, as the model pools: (width,)."""
        return POOLING[self.model.pooling](self.model.backend.hidden_rows([ids])[0]).astype(np.float64)


class EngineEncoderDecoder:
    """An encoder–decoder in the engine: what `EncoderDecoderComparison` asks of it about `answers`."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def logits(self, source: Sequence[int], written: Sequence[int]) -> np.ndarray:
        """What follows each of the ids `written`: (len(written), vocabulary)."""
        return self.model.backend.all_logits(source, written)

    def greedy(self, source: Sequence[int], max_tokens: int) -> list[int]:
        """A greedy text."""
        return self.model.generate_ids(source, max_tokens=max_tokens)

    def beams(self, source: Sequence[int], beams: int, max_tokens: int) -> list[int]:
        """The best text of a beam search, with the token that ended it."""
        best = self.model.beam_ids(source, beams=beams, max_tokens=max_tokens)[0]
        return [*best.ids, *list(self.model.tokenizer.ids.stop)[:1]] if best.ended else list(best.ids)


_RUNTIMES: dict[str, Any] = {
    "decoder": EngineRuntime,
    "encoder": EngineEncoder,
    "encoder_decoder": EngineEncoderDecoder,
}


@contextlib.contextmanager
def open_engine(path: Path) -> Iterator[Any]:
    """A model directory or a GGUF file in the engine, as its shape is asked."""
    model = load(path, backend="native")
    try:
        yield _RUNTIMES[model.config.shape](model)
    finally:
        model.close()


def reference_of_directory(reference: Reference, directory: ModelDirectory) -> tuple[Reference, Any]:
    """lexmill's side for a decoder's directory in the engine, and the tolerance.

    Weights of 16 bits are multiplied with activations of 16 bits; what that costs is measured, as for files.
    """
    types = types_of(directory)
    if set(types.values()) == {"F32"}:
        return reference, exact_tolerance(reference.spread)
    rounding = reference.with_weights(directory.weights(), types, {})
    return rounding, tolerance_of(rounding.noise) if rounding.noise else TOLERANCES["bf16"]


def types_of(directory: ModelDirectory) -> dict[str, str]:
    """As what each weight of a directory is stored."""
    return {own: directory.weight_dtype(own) for own in directory.weights_on_demand()}


def compare_engine(name: str, runtime: Any, reference: Reference, tolerance: Any) -> Iterator[Check]:
    """The checks of a decoder.

    Unlike llama.cpp the engine multiplies prompts in bfloat16 where weights have so few bits, in attention too. What that
    costs is allowed where it is more, and how a runtime rounds is not compared.
    """
    if tolerance is not None:
        if reference.noise is not None and "F16" not in reference.rounding.split():
            in_bf16 = reference.noise_in_bf16()
            if in_bf16.cost > reference.noise.cost:
                tolerance = tolerance_of(in_bf16)
        tolerance = dataclasses.replace(tolerance, rounded_tie=math.inf)
    as_given: Any = EngineRuntime(runtime.model, written=False)  # of the questions there are it is asked some
    given = Comparison(name, as_given, reference, tolerance)
    yield dataclasses.replace(given.logits(), check="prompt logits")
    written = Comparison(name, runtime, reference, tolerance)
    yield written.logits()
    yield written.greedy()


def compare_engine_shape(
    name: str,
    runtime: Any,
    model: LanguageModel,
    types: Mapping[str, str],
    offsets: Mapping[str, np.ndarray],
    tokens: int,
) -> Iterator[Check]:
    """The checks of an encoder's directory, and of an encoder–decoder.

    Args:
        model: lexmill's in torch, with the weights that the engine has.
        types: as what they are stored, by lexmill's names; where all are float32 nothing is rounded.
        offsets: of the blocks of those whose types have them.
        tokens: how many to write for each text.
    """
    exact, encoder = set(types.values()) <= {"F32"}, model.config.shape == "encoder"
    if encoder and exact:
        yield from EncoderComparison(name, runtime, model, True).answers()
    elif encoder:
        rounded = Rounded(model.network, types, offsets, in_bf16=True)
        yield same_embeddings(name, runtime.embed, model, None, rounded)
    else:
        comparison = EncoderDecoderComparison(name, runtime, model, True, tokens)
        if not exact:
            comparison.tolerance = tolerance_of(_noise(model, comparison.pairs, types, offsets))
        yield from comparison.answers()


def _noise(
    model: LanguageModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    types: Mapping[str, str],
    offsets: Mapping[str, np.ndarray],
) -> Noise:
    """What rounding costs an encoder–decoder at each place of some targets: as for written text or for prompts."""

    def answers(within: Any = None, best: np.ndarray | None = None) -> Answers:
        start = model.config.decoder_start
        with within or contextlib.nullcontext():
            rows = [log_softmax(model.logits(source, [start, *target])) for source, target in pairs]
        logprobs = np.concatenate(rows)
        best = np.argsort(-logprobs, -1)[:, :2] if best is None else best
        return Answers(logprobs, best, np.take_along_axis(logprobs, best, -1))

    def noise(in_bf16: bool) -> Noise:
        rounded = Rounded(model.network, types, offsets, in_bf16=in_bf16)
        return Noise.between(plain, answers(rounded, plain.best), answers(rounded.shaken(), plain.best))

    plain = answers()
    return max(noise(False), noise(True), key=lambda found: found.cost)
