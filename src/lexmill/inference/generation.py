"""Generation: one token after the other, streamed as whole characters, until something says stop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from lexmill.errors import ConfigError
from lexmill.inference.constrain import Constraint, Form, FormKind, constrain
from lexmill.inference.native.choosing import Chosen
from lexmill.inference.sampling import SamplingConfig, choose
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
    form: Form | None = None  # what the text has to look like: a JSON schema, a regular expression, a grammar

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ConfigError(f"max_tokens must be 0 or more, but is {self.max_tokens}.")
        if self.logprobs < 0:
            raise ConfigError(f"logprobs must be 0 or more, but is {self.logprobs}.")
        if any(not text for text in self.stop):
            raise ConfigError("A stop string may not be empty.")


def generation_config(
    *,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    logprobs: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    json_schema: str | Mapping[str, Any] | None = None,
    regex: str | None = None,
    grammar: str | None = None,
) -> GenerationConfig:
    """A `GenerationConfig` from flat options.

    Raises:
        ConfigError: an option that makes no sense, or several of the last three.
    """
    if json_schema is not None and not isinstance(json_schema, str):
        json_schema = json.dumps(json_schema)
    asked: dict[FormKind, str | None] = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    forms = [Form(kind, text) for kind, text in asked.items() if text is not None]
    if len(forms) > 1:
        raise ConfigError("A text has one form: give a JSON schema, a regular expression or a grammar.")
    return GenerationConfig(
        max_tokens=max_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=logprobs,
        form=forms[0] if forms else None,
        sampling=SamplingConfig(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
        ),
    )


def generate(
    session: Session, tokenizer: Tokenizer, prompt: Sequence[int], config: GenerationConfig
) -> Iterator[Step]:
    """Generate behind `prompt` (at least one id), a step at a time.

    Generation ends at an end-of-text id of the model ("end", the id is not given out), before a
    stop string ("stop"), after `max_tokens` ("length"), or when the context is full ("context").
    """
    writing = Writing(tokenizer, prompt, config, session.context)
    fresh: Sequence[int] = writing.ids
    while not writing.ended:
        yield from writing.take(session.read(fresh))
        fresh = writing.ids[-1:]
    yield from writing.rest()


class Writing:
    """One text that is being written: chooses each token, shows what can be shown, and knows when it ends.

    A backend hands it the logits behind the last of `ids` until it has `ended`, and `rest` comes last.

    Attributes:
        ids: of the whole text so far.
        given: how many of them are the prompt's.

    Args:
        prompt: at least one id.
        context: the most ids that the text may have.

    Raises:
        ConfigError: `config.form` cannot be understood.
        MissingPackageError: it needs a package that is not installed.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], config: GenerationConfig, context: int
    ) -> None:
        self.ids = list(prompt)
        self.given = len(self.ids)
        self._tokenizer, self._config, self._context = tokenizer, config, context
        self._stop = frozenset(tokenizer.ids.stop)
        self._random = np.random.default_rng(config.sampling.seed)
        self._decoder, self._held = tokenizer.stream(skip_special=True), _StopStrings(config.stop)
        self.constraint: Constraint | None = constrain(config.form, tokenizer) if config.form else None
        self._reason: StopReason | None = None if config.max_tokens else "length"

    @property
    def ended(self) -> bool:
        """Whether no more logits are wanted."""
        return self._reason is not None

    @property
    def room(self) -> int:
        """How many more tokens it may get."""
        return min(self._config.max_tokens, self._context - self.given) - (len(self.ids) - self.given)

    def take(self, logits: np.ndarray) -> list[Step]:
        """Choose the next token by the logits (vocab_size,) behind the last one."""
        allowed = self.constraint.allowed(len(logits)) if self.constraint else None
        chosen = choose(
            logits,
            self.ids,
            self._config.sampling,
            self._random,
            given=self.given,
            allowed=allowed,
            best=self._config.logprobs,
        )
        if self.constraint:
            self.constraint.advance(chosen.token)
        if chosen.token in self._stop:
            self._reason = "end"
            return []
        text, stopped = self._held.push(self._decoder.push(chosen.token))
        self.ids.append(chosen.token)
        if stopped:
            self._reason = "stop"
        elif len(self.ids) - self.given == self._config.max_tokens:
            self._reason = "length"
        elif len(self.ids) >= self._context:
            self._reason = "context"
        return [Step(chosen.token, text, chosen.logprob, self._rivals(chosen))]

    def rest(self) -> list[Step]:
        """The last step: what was held back, and why generation ended."""
        if self._reason == "stop":
            return [Step(None, "", reason="stop")]
        text, stopped = self._held.push(self._decoder.finish())
        return [
            Step(
                None,
                text + ("" if stopped else self._held.rest()),
                reason="stop" if stopped else self._reason,
            )
        ]

    def _rivals(self, chosen: Chosen) -> tuple[Rival, ...]:
        known = self._tokenizer.vocab_size
        return tuple(
            Rival(token, self._tokenizer.decode([token]) if token < known else "", logprob)
            for token, logprob in chosen.best
        )


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
