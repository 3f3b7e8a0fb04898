"""What `verify` asks of an encoder–decoder: ids, logits of given targets, greedy and beam search, stop tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lexmill.inference.language_model import LanguageModel
from lexmill.inference.sampling import log_softmax
from lexmill.runtimes.verify_cases import SOURCES, TEXTS, id_rows, with_gap
from lexmill.runtimes.verify_checks import same_ids, same_logprobs
from lexmill.runtimes.verify_report import Check, counted, short
from lexmill.runtimes.verify_stress import Stress
from lexmill.runtimes.verify_tolerances import TOLERANCES, Tolerance, mean_divergence

if TYPE_CHECKING:
    from lexmill.runtimes.verify_transformers import TransformersEncoderDecoder

_BEAMS = 4


class EncoderDecoderComparison:
    """A runtime's answers against lexmill's; each method is one check.

    Args:
        name: of the runtime.
        model: lexmill's own, the reference.
        read: whether the model has a tokenizer; without one only logits of ids are compared.
        tokens: how many to write for each text.
        tolerance: where the runtime rounds; None: as far as float32 rounds.
    """

    def __init__(
        self,
        name: str,
        runtime: TransformersEncoderDecoder,
        model: LanguageModel,
        read: bool,
        tokens: int,
        tolerance: Tolerance | None = None,
    ) -> None:
        self.name, self.runtime, self.model, self.read, self.limit = name, runtime, model, read, tokens
        self.tolerance = tolerance or TOLERANCES["transformers"]
        config = model.config
        if read:
            encode = model.tokenizer.encode
            pairs = [(encode(source), encode(target)) for source, target in self._texts()]
            self.pairs = [(source, target) for source, target in pairs if source]
        else:
            rows = id_rows(config.vocab_size, config.context)
            self.pairs = list(zip(rows, reversed(rows)))
        self.sources = [source for source, _ in self.pairs]

    def _texts(self) -> Iterator[tuple[str, str]]:
        yield from SOURCES
        for token in self.model.tokenizer.ids.sentinels[:1]:
            sentinel = self.model.tokenizer.token_text(token)
            yield with_gap(SOURCES[2][0], sentinel), f"{sentinel} the sea"

    def all(self) -> Iterator[Check]:
        """Every check, cheap ones first."""
        if self.read:
            tokenizer = self.model.tokenizer
            ids = {text: tokenizer.encode(text) for text in TEXTS}
            check = same_ids(self.name, ids, self.runtime.tokenize)
            yield Stress(tokenizer).added_to(check, self.runtime.tokenize)
        yield from self.answers()
        if self.read:
            yield self._written("stop tokens", self.stops)

    def answers(self) -> Iterator[Check]:
        """Of these, those of what the model computes."""
        yield self.logits()
        if self.read:
            yield self._written("greedy", self.greedy)
            yield self._written("beams", self.beams)

    def logits(self) -> Check:
        """What follows each token of a given target."""
        start = self.model.config.decoder_start
        cases = (
            (self.model.logits(source, [start, *target]), self.runtime.logits(source, [start, *target]))
            for source, target in self.pairs
        )
        if self.tolerance.kind == "max":
            return same_logprobs(self.name, "logits", cases, "pairs of source and target")
        ours, theirs = (log_softmax(np.concatenate(logits)) for logits in zip(*cases))
        figure, allowed = mean_divergence(ours, theirs), self.tolerance.logits
        detail = (
            f"{len(self.pairs)} pairs of source and target, {len(ours)} positions: mean KL {figure:.2g} nats"
        )
        return Check(self.name, "logits", figure <= allowed, figure, allowed, detail)

    def _written(self, name: str, check: Callable[[], Check]) -> Check:
        """A check that needs `generate`, which may break down where the model is none the worse for it."""
        try:
            return check()
        except Exception as error:
            said, config = f"{type(error).__name__}: {error}"[:300], self.model.config
            if isinstance(error, IndexError) and config.decoder_layers > config.layers:
                # seen in 5.23: it makes the decoder's cache with as many layers as the encoder has
                why = "transformers' generate breaks on a decoder with more layers than the encoder"
                return Check(self.name, name, None, detail=f"{why} ({said})")
            return Check(self.name, name, False, detail=f"generate: {said}")

    def greedy(self) -> Check:
        """Greedy continuations, token for token; where they part lexmill must hardly prefer its own."""
        cases = []
        for source in self.sources:
            ours = self.model.generate_ids(source, max_tokens=self.limit)
            theirs = self.runtime.greedy(source, self.limit)
            gap = 0.0 if ours == theirs else self._greatest_gap(source, theirs)
            cases.append((source, ours, theirs, gap))
        return self._same_texts("greedy", cases, "continuations")

    def _greatest_gap(self, source: Sequence[int], answer: Sequence[int]) -> float:
        """How far below lexmill's first choice a token of `answer` lies, at most."""
        rows = log_softmax(self.model.logits(source, [self.model.config.decoder_start, *answer]))
        chosen = rows[np.arange(len(answer)), answer]
        gaps = rows.max(-1)[: len(answer)] - chosen
        if len(answer) < self.limit:  # it ended here
            stop = list(self.model.tokenizer.ids.stop)
            gaps = np.append(gaps, rows[-1].max() - rows[-1][stop].max(initial=-np.inf))
        return float(gaps.max(initial=0.0))

    def beams(self) -> Check:
        """The best of four beams; another text must be as good by lexmill's own score."""
        cases, stop = [], set(self.model.tokenizer.ids.stop)
        for source in self.sources:
            best = self.model.beam_ids(source, beams=_BEAMS, max_tokens=self.limit)[0]
            theirs = self.runtime.beams(source, _BEAMS, self.limit)
            ended = bool(theirs) and theirs[-1] in stop
            answer = theirs[:-1] if ended else theirs
            gap = 0.0
            if list(best.ids) != answer:
                gap = abs(best.score - self._score(source, theirs))
            cases.append((source, list(best.ids), answer, gap))
        return self._same_texts("beams", cases, f"texts of {_BEAMS} beams")

    def _score(self, source: Sequence[int], answer: Sequence[int]) -> float:
        """The mean log-probability of `answer` with the token that ends it, as beams are compared by."""
        if not answer:
            return float("-inf")
        rows = log_softmax(self.model.logits(source, [self.model.config.decoder_start, *answer[:-1]]))
        return float(rows[np.arange(len(answer)), answer].sum() / len(answer))

    def _same_texts(
        self, check: str, cases: list[tuple[list[int], list[int], list[int], float]], unit: str
    ) -> Check:
        """Continuations that are the same ids, or part where `gap` is a tie."""
        same = sum(ours == theirs for _, ours, theirs, _ in cases)
        apart = [(source, gap) for source, ours, theirs, gap in cases if ours != theirs]
        wrong = [(source, gap) for source, gap in apart if not gap <= self.tolerance.tie]
        detail = f"{same} of {len(cases)} {unit} identical"
        if len(apart) > len(wrong):
            detail += f", {len(apart) - len(wrong)} but for ties (allowed {self.tolerance.tie:.2g})"
        if wrong:
            source, gap = wrong[0]
            text = short(self.model.tokenizer.decode(source))
            detail += f"; for {text} it writes another, {gap:.2g} below by lexmill's measure"
        return Check(self.name, check, not wrong, len(wrong), 0, detail, ties=len(apart) - len(wrong))

    def stops(self) -> Check:
        """Which tokens end a text, tried on all that are special to either side and on an ordinary one."""
        tokenizer = self.model.tokenizer
        ends, size = tokenizer.ids.stop, self.model.config.vocab_size
        special = {tokenizer.vocabulary[text] for text in tokenizer.special_texts} - set(
            tokenizer.ids.sentinels[1:]  # one of them stands for all
        )
        asked = {*special, *ends, *tokenizer.encode("a"), *self.runtime.declared_ids()}
        cases = (
            (token, token in ends, self.runtime.ends_at(token, self.sources[0]))
            for token in sorted(asked)
            if token < size
        )
        return counted(self.name, "stop tokens", cases, "ids")
