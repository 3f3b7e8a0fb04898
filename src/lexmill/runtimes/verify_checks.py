"""The questions that `verify` asks a runtime, lexmill's own answers to them, and how far they may differ."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lexmill.errors import DataError
from lexmill.inference.sampling import log_softmax
from lexmill.model.directory import ModelDirectory
from lexmill.runtimes.verify_cases import CONVERSATIONS, TEXTS
from lexmill.runtimes.verify_report import Check

_PROBABLE = 20  # tokens at a position whose error decides what counts as a tie


@dataclass(frozen=True)
class Tolerance:
    """How far a runtime may be from lexmill.

    Attributes:
        logits: the largest figure that passes: the greatest difference of a log-probability where
            `kind` is "max", the mean Kullback-Leibler divergence in nats where it is "KL".
        tie: two tokens that lexmill itself keeps no farther apart than this (in log-probability)
            may change places in greedy generation. For the lossy types it is at most this; see
            `Comparison._tie_gap`.
        weights: the largest error of a stored weight, as a share of the largest in its block of 32.
    """

    logits: float
    kind: str
    tie: float
    weights: float = 0.0


# Measured on random models (weights of twice the usual size: the worst case), and on a trained one:
#              random: max    KL mean     trained: max   KL mean
# transformers   2.5e-5                       2.0e-6
# f32            5.1e-5     3e-7              4.3e-6     1e-7
# f16            5.2e-2     3e-5              6.3e-4     1e-7
# bf16           3.9e-1     2e-3              5.1e-3     3e-7
# q8_0           1.2e+0     2e-2              1.4e-2     5e-6
# With f16, bf16 and q8_0 files llama.cpp rounds the activations of each product to the same type, so
# a greatest difference over the vocabulary says little; the divergence weighs it by probability. The
# weights' tolerances are half a step: 2^-11, 2^-8, and 1/254 plus the rounding of the scale to f16.
TOLERANCES = {
    "transformers": Tolerance(1e-4, "max", 1e-4),
    "f32": Tolerance(1e-3, "max", 1e-4, 0.0),
    "f16": Tolerance(1e-3, "KL", 0.1, 2.0**-11),
    "bf16": Tolerance(1e-2, "KL", 0.5, 2.0**-8),
    "q8_0": Tolerance(5e-2, "KL", 2.0, 1 / 254 + 2.0**-10),
}


class Runtime(Protocol):
    """What every runtime is asked."""

    def tokenize(self, text: str) -> list[int]: ...
    def detokenize(self, ids: Sequence[int]) -> str: ...
    def apply_template(self, messages: Sequence[dict[str, str]]) -> str: ...
    def logprobs(self, prompts: Sequence[Sequence[int]], vocabulary: int) -> np.ndarray: ...
    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int]: ...
    def ends_at(self, token: int, before: Sequence[int]) -> bool: ...
    def declared_ids(self) -> list[int]: ...


class Reference:
    """lexmill's own answers, each found once."""

    def __init__(self, model: Any, directory: ModelDirectory, prompts: Sequence[str], tokens: int) -> None:
        self.model, self.directory, self.tokenizer = model, directory, directory.tokenizer
        self.vocabulary, self.context = directory.config.vocab_size, directory.config.context
        self.bos = self.tokenizer.encode("")
        self.ids = {text: self.tokenizer.encode(text) for text in TEXTS}
        self.texts = {text: self.tokenizer.decode(ids[len(self.bos) :]) for text, ids in self.ids.items()}
        self.chats = list(self._chats())
        asked = [self.tokenizer.encode(prompt) for prompt in prompts]
        if self.chats:
            asked.append(self.tokenizer.encode(self.chats[0][1]))
        self.prompts = [ids for ids in asked if 0 < len(ids) < self.context - 1]
        self.positions = [
            ids[:end] for ids in self.prompts for end in sorted({1, (len(ids) + 1) // 2, len(ids)})
        ]
        self.logprobs = np.stack([self.row(ids) for ids in self.positions])
        # the last position of the context stays free: runtimes count it differently
        self.greedy = [
            (ids, limit, model.generate_ids(ids, max_tokens=limit))
            for ids in self.prompts
            for limit in [min(tokens, self.context - len(ids) - 1)]
        ]
        self.longest = max((len(ids) for ids in self.prompts), default=0) + tokens

    def row(self, ids: Sequence[int]) -> np.ndarray:
        return log_softmax(self.model.logits(ids)[-1])

    def _chats(self) -> Iterator[tuple[list[dict[str, str]], str]]:
        if not self.tokenizer.chat_template:
            return
        for messages in CONVERSATIONS:
            with contextlib.suppress(DataError):  # a template may refuse some, e.g. a system message
                yield list(messages), self.tokenizer.render_chat(list(messages))

    def choice_gaps(self, ids: list[int], chosen: list[int], limit: int) -> np.ndarray:
        """How far below lexmill's first choice each chosen token lies, given all that came before it."""
        rows = log_softmax(self.model.logits(ids + chosen))[len(ids) - 1 :]
        gaps = rows.max(-1)[: len(chosen)] - rows[np.arange(len(chosen)), chosen]
        if len(chosen) < limit:  # it ended here: the best of the tokens that end a text was chosen
            gaps = np.append(gaps, rows[-1].max() - rows[-1][list(self.tokenizer.ids.stop)].max())
        return gaps


class Comparison:
    """One runtime's answers against lexmill's; each method is one check."""

    def __init__(
        self, name: str, runtime: Runtime, reference: Reference, tolerance: Tolerance | None
    ) -> None:
        self.name, self.runtime, self.reference, self.tolerance = name, runtime, reference, tolerance
        self._error = 0.0  # of the log-probability of a probable token, as found by `logits`

    def all(self) -> Iterator[Check]:
        """Every check, cheap ones first."""
        for check in (self.tokens, self.round_trip, self.template, self.stops, self.logits, self.greedy):
            yield check()

    def tokens(self) -> Check:
        """The ids of texts on which tokenizers differ."""
        answers = {text: self.runtime.tokenize(text) for text in self.reference.ids}
        wrong = [text for text, ids in self.reference.ids.items() if answers[text] != ids]
        check = self._count(
            "tokens", ((text, ids, answers[text]) for text, ids in self.reference.ids.items()), "texts"
        )
        if wrong and not any(unicodedata.is_normalized("NFC", text) for text in wrong):
            # transformers 5 reads every model of the type "qwen2" with a class that adds NFC, whatever
            # tokenizer.json says; llama.cpp never normalises.
            why = "only texts that are not in Unicode's composed form (NFC) differ; one side composes them"
            check = replace(check, detail=f"{check.detail}; {why}")
        return check

    def round_trip(self) -> Check:
        """The text of the ids of a text; its normal form, where the tokenizer normalises."""
        skip, texts = len(self.reference.bos), self.reference.texts
        found = (
            (text, expected, self.runtime.detokenize(self.runtime.tokenize(text)[skip:]))
            for text, expected in texts.items()
        )
        return self._count("round trip", found, "texts")

    def template(self) -> Check:
        """The prompts of conversations, byte for byte."""
        chats = self.reference.chats
        if not chats:
            return Check(self.name, "chat template", None, detail="the model has no chat template")
        return self._count(
            "chat template",
            ((messages, text, self.runtime.apply_template(messages)) for messages, text in chats),
            "conversations",
        )

    def stops(self) -> Check:
        """Which tokens end generation, tried on all that are special to either side and on an ordinary one."""
        tokenizer, ordinary = self.reference.tokenizer, self.reference.tokenizer.encode("a")
        ends = tokenizer.ids.stop
        special = {tokenizer.vocabulary[text] for text in tokenizer.special_texts}
        before = next(iter(self.reference.prompts), ordinary)
        return self._count(
            "stop tokens",
            (
                (token, token in ends, self.runtime.ends_at(token, before))
                for token in sorted({*special, *ends, *ordinary, *self.runtime.declared_ids()})
            ),
            "ids",
        )

    def _count(self, check: str, cases: Iterable[tuple[Any, Any, Any]], unit: str) -> Check:
        """A check whose figure is the number of cases in which the runtime's answer is not lexmill's."""
        total, wrong, first = 0, 0, ""
        for question, expected, answer in cases:
            total += 1
            if answer != expected:
                wrong += 1
                first = first or f"; {_short(question)}: lexmill {_short(expected)}, here {_short(answer)}"
        detail = f"{total - wrong} of {total} {unit} equal{first}"
        return Check(self.name, check, wrong == 0, wrong, 0, detail)

    def logits(self) -> Check:
        """The log-probabilities of all next tokens at several positions."""
        ours = self.reference.logprobs
        theirs = self.runtime.logprobs(self.reference.positions, self.reference.vocabulary)
        difference = np.abs(theirs - ours)
        probable = np.argsort(-ours, axis=-1)[:, :_PROBABLE]
        self._error = float(np.take_along_axis(difference, probable, -1).max())
        # float noise may bring the divergence of equal rows a little below zero
        divergence = float((np.exp(ours) * (ours - theirs)).sum(-1).mean())
        divergence = 0.0 if -1e-6 < divergence < 0 else divergence
        detail = (
            f"{len(ours)} positions: greatest difference {difference.max():.2g}, "
            f"mean KL {divergence:.2g} nats"
        )
        if self.tolerance is None:
            return Check(self.name, "logits", None, detail=f"{detail}; {_NO_TOLERANCE}")
        figure = abs(divergence) if self.tolerance.kind == "KL" else float(difference.max())
        passed = bool(figure <= self.tolerance.logits)  # not so for NaN
        return Check(self.name, "logits", passed, figure, self.tolerance.logits, detail)

    def greedy(self) -> Check:
        """Greedy continuations, token for token, ties apart."""
        if self.tolerance is None:
            return Check(self.name, "greedy", None, detail=_NO_TOLERANCE)
        gap, ties, wrong, first = self._tie_gap(self.tolerance), 0, 0, ""
        for ids, limit, expected in self.reference.greedy:
            answer = self.runtime.greedy(ids, limit)
            if answer == expected:
                continue
            gaps = self.reference.choice_gaps(ids, answer, limit)
            if (gaps <= gap).all():
                ties += 1
                continue
            wrong += 1
            at = int((~(gaps <= gap)).argmax())
            first = first or (
                f"; {at} tokens after {_short(self.reference.tokenizer.decode(ids))} it takes one "
                f"that lexmill puts {gaps[at]:.2g} below its own"
            )
        total = len(self.reference.greedy)
        detail = f"{total - wrong} of {total} continuations equal"
        if ties:
            detail += f", {ties} of them up to ties (tokens that lexmill keeps less than {gap:.2g} apart)"
        return Check(self.name, "greedy", wrong == 0, wrong, 0, detail + first)

    def _tie_gap(self, tolerance: Tolerance) -> float:
        """The gap that counts as a tie.

        Two log-probabilities that are each off by an error change places across a gap of twice that;
        it was measured at few positions, so twice as much again. A file whose error is out of bounds
        gets no more room for it.
        """
        return tolerance.tie if tolerance.kind == "max" else min(tolerance.tie, 4 * self._error)


_NO_TOLERANCE = "no tolerance is stated for this type of file"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"
