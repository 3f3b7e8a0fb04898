"""Generation: one token after the other, streamed as whole characters, until something says stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from lexmill.errors import ConfigError
from lexmill.inference.sampling import SamplingConfig, choose, log_softmax
from lexmill.tokenizer.tokenizer import Tokenizer

StopReason = Literal["end", "stop", "length", "context"]


class Session(Protocol):
    """A backend that has read a text and can read on. `context` is the most tokens it can hold."""

    context: int

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Read more tokens; returns the logits (vocab_size,) for what follows the last one."""
        ...


@dataclass(frozen=True)
class Rival:
    """A token that could have stood here, and its log-probability in nats."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Step:
    """One generated token.

    `text` is what can be shown now: whole characters only, and nothing that may yet turn out to
    be a stop string. `rivals` are the most probable tokens, the chosen one included if it is one.
    """

    token: int | None  # None in the last step, which only flushes text
    text: str
    logprob: float = 0.0
    rivals: tuple[Rival, ...] = ()
    reason: StopReason | None = None  # why generation ended; only in the last step


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What ends generation, and what is told on the way."""

    max_tokens: int = 256
    stop: tuple[str, ...] = ()  # generation ends before any of these texts
    logprobs: int = 0  # how many rivals to tell at each step
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ConfigError(f"max_tokens must be 0 or more, but is {self.max_tokens}.")
        if self.logprobs < 0:
            raise ConfigError(f"logprobs must be 0 or more, but is {self.logprobs}.")
        if any(not text for text in self.stop):
            raise ConfigError("A stop string may not be empty.")


def generate(
    session: Session, tokenizer: Tokenizer, prompt: Sequence[int], config: GenerationConfig
) -> Iterator[Step]:
    """Generate behind `prompt` (at least one id), a step at a time.

    Generation ends at an end-of-text id of the model ("end", the id is not given out), before a
    stop string ("stop"), after `max_tokens` ("length"), or when the context is full ("context").
    """
    random = np.random.default_rng(config.sampling.seed)
    seen = list(prompt)
    decoder, held = tokenizer.stream(skip_special=True), _StopStrings(config.stop)
    logits = session.read(seen)
    reason: StopReason = "length"
    for _ in range(config.max_tokens):
        token = choose(logits, seen, config.sampling, random)
        if token in tokenizer.ids.stop:
            reason = "end"
            break
        logprob, rivals = _tell(logits, token, config.logprobs, tokenizer) if config.logprobs else (0.0, ())
        text, stopped = held.push(decoder.push(token))
        seen.append(token)
        yield Step(token, text, logprob, rivals)
        if stopped:
            yield Step(None, "", reason="stop")
            return
        if len(seen) >= session.context:
            reason = "context"
            break
        logits = session.read([token])
    text, stopped = held.push(decoder.finish())
    yield Step(None, text + ("" if stopped else held.rest()), reason="stop" if stopped else reason)


def _tell(
    logits: np.ndarray, token: int, count: int, tokenizer: Tokenizer
) -> tuple[float, tuple[Rival, ...]]:
    logprobs = log_softmax(logits)
    best = np.argsort(-logprobs, kind="stable")[:count]
    rivals = (
        Rival(int(i), tokenizer.decode([int(i)]) if i < tokenizer.vocab_size else "", float(logprobs[i]))
        for i in best
    )
    return float(logprobs[token]), tuple(rivals)


class _StopStrings:
    """Holds text back for as long as it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown, and whether a stop string has come."""
        self._held += text
        places = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            shown, self._held = self._held[: min(places)], ""
            return shown, True
        keep = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), keep, -1):
                if self._held.endswith(stop[:size]):
                    keep = size
                    break
        end = len(self._held) - keep
        shown, self._held = self._held[:end], self._held[end:]
        return shown, False

    def rest(self) -> str:
        """What was held back and turned out to be text."""
        rest, self._held = self._held, ""
        return rest
