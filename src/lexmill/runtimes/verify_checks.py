"""The questions that `verify` asks a runtime, and how far its answers may be from lexmill's."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lexmill.inference.sampling import log_softmax
from lexmill.runtimes.verify_cases import id_rows
from lexmill.runtimes.verify_report import Check, counted, short

if TYPE_CHECKING:
    from lexmill.inference.language_model import LanguageModel
    from lexmill.runtimes.verify_reference import Reference

_PROBABLE = 20  # tokens at a position that are looked at one by one


@dataclass(frozen=True)
class Tolerance:
    """How far a runtime may be from lexmill running the same weights.

    Attributes:
        logits: the largest figure that passes: the greatest difference of a log-probability where
            `kind` is "max", the mean Kullback-Leibler divergence in nats where it is "KL".
        tie: two tokens that lexmill keeps no farther apart than this (in log-probability) may change
            places in greedy generation; never more than twice the error at that very position.
        rounding: as `logits`, against lexmill with activations rounded as the runtime rounds them.
        rounded_tie: as `tie`, by lexmill with activations so rounded.
    """

    logits: float
    kind: str
    tie: float
    rounding: float = 0.0
    rounded_tie: float = 0.0


# Measured against lexmill running the file's own weights, on the finished quickstart model (76 positions along
# the continuations of 7 prompts) and on random models with twice the usual weights (the worst case):
#                trained: KL      gap of the five   random: KL    the same with activations rounded, trained:
#                mean             best, 99 %        mean          KL mean    gap, 99 %
# f16            1e-7             0.005             1.7e-6        (no nearer)
# bf16           3.9e-5           0.050             9.1e-5        4.6e-6     0.021
# q8_0           7.0e-4           0.204             1.1e-3        3.8e-5     0.058
# transformers   greatest difference 1.4e-5 trained, 2.5e-5 random; f32: 3.1e-5, 1.4e-5.
# A tie is what those 99 % are, rounded up. Ties that were needed there: gaps of 0.0004, 0.017 and 0.042.
# The other quantised types, on random models 256 wide, as multiples of what Q8_0 has there: types that meet blocks
# of 32 (Q4_0 to Q5_1) KL 0.9 to 1.1, gaps 0.9 to 1.25; those that meet blocks of 256 (K-quants) KL 1.4 to 1.9,
# gaps 1.1 to 1.6. The latter get twice and 1.6 times what Q8_0 gets.
_BY_32 = Tolerance(3e-3, "KL", 0.2, 2e-4, 0.06)
_BY_256 = Tolerance(6e-3, "KL", 0.32, 2e-4, 0.1)
TOLERANCES = {
    "transformers": Tolerance(1e-4, "max", 1e-4),
    "f32": Tolerance(1e-4, "max", 1e-4),
    "f16": Tolerance(1e-5, "KL", 0.01),
    "bf16": Tolerance(3e-4, "KL", 0.05, 2e-5, 0.025),
    **dict.fromkeys(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0"), _BY_32),
    **dict.fromkeys(("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s"), _BY_256),
}


class Runtime(Protocol):
    """What every runtime is asked."""

    def tokenize(self, text: str) -> list[int]: ...
    def tokenize_plain(self, text: str) -> list[int]: ...
    def detokenize(self, ids: Sequence[int]) -> str: ...
    def apply_template(self, messages: Sequence[dict[str, str]]) -> str: ...
    def logprobs(self, prompts: Sequence[Sequence[int]], vocabulary: int) -> np.ndarray: ...
    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int]: ...
    def ends_at(self, token: int, before: Sequence[int]) -> bool: ...
    def declared_ids(self) -> list[int]: ...


class Comparison:
    """One runtime's answers against lexmill's; each method is one check."""

    def __init__(
        self, name: str, runtime: Runtime, reference: Reference, tolerance: Tolerance | None
    ) -> None:
        self.name, self.runtime, self.reference, self.tolerance = name, runtime, reference, tolerance
        self._found: np.ndarray | None = None  # the runtime's log-probabilities at the positions

    def all(self) -> Iterator[Check]:
        """Every check, cheap ones first."""
        for check in (self.tokens, self.injection, self.round_trip, self.template, self.stops, self.logits):
            yield check()
        if self.reference.rounding:
            yield self.rounding()
        yield self.greedy()

    def tokens(self) -> Check:
        """The ids of texts on which tokenizers differ."""
        check = same_ids(self.name, self.reference.ids, self.runtime.tokenize)
        return self.reference.stress.added_to(check, self.runtime.tokenize)

    def injection(self) -> Check:
        """Texts of special tokens, read as what a user wrote: the same ids, and not one that controls the model."""
        tokenizer, plain = self.reference.tokenizer, self.reference.plain
        answers = {text: self.runtime.tokenize_plain(text) for text in plain}
        cases = ((text, ids, answers[text]) for text, ids in plain.items())
        check = counted(self.name, "injection", cases, "texts of special tokens")
        control = {tokenizer.vocabulary[text] for text in tokenizer.special_texts} - {tokenizer.ids.unk}
        leaks = [text for text, ids in (*plain.items(), *answers.items()) if control & set(ids)]
        if leaks:
            detail = f"{check.detail}; a user's text becomes a control token: {short(leaks[0])}"
            check = replace(check, passed=False, figure=max(check.figure or 0, 1), detail=detail)
        return check

    def round_trip(self) -> Check:
        """The text of the ids of a text; its normal form, where the tokenizer normalises."""
        skip, texts = len(self.reference.bos), self.reference.texts
        found = (
            (text, expected, self.runtime.detokenize(self.runtime.tokenize(text)[skip:]))
            for text, expected in texts.items()
        )
        return counted(self.name, "round trip", found, "texts")

    def template(self) -> Check:
        """The prompts of conversations, byte for byte."""
        chats = self.reference.chats
        if not chats:
            return Check(self.name, "chat template", None, detail="the model has no chat template")
        return counted(
            self.name,
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
        return counted(
            self.name,
            "stop tokens",
            (
                (token, token in ends, self.runtime.ends_at(token, before))
                for token in sorted({*special, *ends, *ordinary, *self.runtime.declared_ids()})
            ),
            "ids",
        )

    def logits(self) -> Check:
        """The log-probabilities of all next tokens at several positions."""
        divergence, greatest, detail = self._apart_from(self.reference.logprobs)
        if self.tolerance is None:
            return Check(self.name, "logits", None, detail=f"{detail}; {_NO_TOLERANCE}")
        figure = divergence if self.tolerance.kind == "KL" else greatest
        passed = bool(figure <= self.tolerance.logits)  # not so for NaN
        if not passed:
            detail += self._first_apart()
        return Check(self.name, "logits", passed, figure, self.tolerance.logits, detail)

    def _first_apart(self) -> str:
        """The first position that is farther off than all may be together."""
        assert self._found is not None and self.tolerance is not None
        ours, ids = self.reference.logprobs, self.reference.positions
        for at, (own, their) in enumerate(zip(ours, self._found, strict=True)):
            greatest = self.tolerance.kind == "max"
            apart = np.abs(own - their).max() if greatest else mean_divergence(own[None], their[None])
            if not apart <= self.tolerance.logits:
                after = short(self.reference.tokenizer.decode(ids[at])[-60:])
                return f"; first at position {at}, {len(ids[at])} tokens long, after {after}"
        return ""

    def rounding(self) -> Check:
        """The same against lexmill with activations rounded: whether that explains what was left."""
        assert self.reference.rounded_logprobs is not None
        divergence, _, detail = self._apart_from(self.reference.rounded_logprobs)
        detail += f", once lexmill rounds activations to {self.reference.rounding} too"
        if self.tolerance is None:
            return Check(self.name, "rounding", None, detail=f"{detail}; {_NO_TOLERANCE}")
        passed = bool(divergence <= self.tolerance.rounding)
        return Check(self.name, "rounding", passed, divergence, self.tolerance.rounding, detail)

    def _apart_from(self, ours: np.ndarray) -> tuple[float, float, str]:
        """The mean divergence of the runtime's log-probabilities from these, the greatest difference, both said."""
        if self._found is None:
            self._found = self.runtime.logprobs(self.reference.positions, self.reference.vocabulary)
        difference = np.abs(self._found - ours)
        probable = np.argsort(-ours, axis=-1)[:, :_PROBABLE]
        among = float(np.take_along_axis(difference, probable, -1).max())
        divergence = mean_divergence(ours, self._found)
        detail = (
            f"{len(ours)} positions: greatest difference {difference.max():.2g} "
            f"(of the {_PROBABLE} most probable {among:.2g}), mean KL {divergence:.2g} nats"
        )
        return divergence, float(difference.max()), detail

    def greedy(self) -> Check:
        """Greedy continuations, token for token; what parts from lexmill's must be a tie at every token."""
        if self.tolerance is None:
            return Check(self.name, "greedy", None, detail=_NO_TOLERANCE)
        same, tied, wrong, largest, first = 0, 0, 0, 0.0, ""
        for ids, limit, expected in self.reference.greedy:
            answer = self.runtime.greedy(ids, limit)
            if answer == expected:
                same += 1
                continue
            gaps, ties = self._ties(ids, answer, limit, self.tolerance)
            if ties.all():
                tied += max(1, int((gaps > 0).sum()))
                largest = max(largest, float(gaps.max()))
                continue
            wrong += 1
            at = int((~ties).argmax())
            first = first or (
                f"; {at} tokens after {short(self.reference.tokenizer.decode(ids))} it takes one "
                f"that lexmill puts {gaps[at]:.2g} below its own"
            )
        total = len(self.reference.greedy)
        detail = f"{same} of {total} continuations identical"
        if total - same - wrong:
            detail += (
                f", {total - same - wrong} but for ties: {tied} {'token' if tied == 1 else 'tokens'} where lexmill's gap between the two "
                f"is at most {largest:.2g} (allowed {self.tolerance.tie:g})"
            )
        return Check(self.name, "greedy", wrong == 0, wrong, 0, detail + first, ties=tied)

    def _ties(
        self, ids: list[int], answer: list[int], limit: int, tolerance: Tolerance
    ) -> tuple[np.ndarray, np.ndarray]:
        """Follow the runtime's own continuation: lexmill's gap at each token, and whether it may be there.

        A token that is not lexmill's first choice may stand where the gap is within `tie`, within twice
        the runtime's error at that position, and, where the runtime rounds activations, within
        `rounded_tie` for lexmill that rounds them too.
        """
        reference = self.reference
        gaps = reference.choice_gaps(ids, answer, limit)
        fine = gaps <= tolerance.tie
        if reference.rounding:
            fine &= reference.choice_gaps(ids, answer, limit, rounded=True) <= tolerance.rounded_tie
        for at in np.flatnonzero((gaps > 0) & fine):
            before = ids + answer[:at]
            ours, theirs = reference.row(before), self.runtime.logprobs([before], reference.vocabulary)[0]
            chosen = [answer[at]] if at < len(answer) else list(reference.tokenizer.ids.stop)
            looked_at = [*np.argsort(-ours)[:_PROBABLE], *chosen]
            fine[at] = gaps[at] <= 2 * np.abs(ours - theirs)[looked_at].max()
        return gaps, fine


def compare_ids(runtime: str, other: Runtime, model: LanguageModel) -> Iterator[Check]:
    """The one check of a decoder without a tokenizer: what follows rows of ids."""
    size = model.config.vocab_size
    rows = id_rows(size, model.config.context)
    cases = ((model.logits(ids)[-1:], other.logprobs([ids], size)) for ids in rows)
    yield same_logprobs(runtime, "logits", cases, "rows of ids (the model has no tokenizer)")


def same_ids(runtime: str, expected: Mapping[str, list[int]], tokenize: Callable[[str], list[int]]) -> Check:
    """The ids of texts on which tokenizers differ."""
    answers = {text: tokenize(text) for text in expected}
    wrong = [text for text, ids in expected.items() if answers[text] != ids]
    check = counted(
        runtime, "tokens", ((text, ids, answers[text]) for text, ids in expected.items()), "texts"
    )
    if wrong and not any(unicodedata.is_normalized("NFC", text) for text in wrong):
        # transformers 5 reads every model of the type "qwen2" with a class that adds NFC, whatever
        # tokenizer.json says; llama.cpp never normalises.
        why = "only texts that are not in Unicode's composed form (NFC) differ; one side composes them"
        check = replace(check, detail=f"{check.detail}; {why}")
    return check


def same_logprobs(
    runtime: str, check: str, cases: Iterable[tuple[np.ndarray, np.ndarray]], unit: str
) -> Check:
    """A check whose figure is the greatest difference of a log-probability; float32 on both sides.

    Args:
        cases: lexmill's logits and the runtime's, (positions, choices) each.
        unit: what a case is, in the plural.
    """
    total, greatest, tolerance = 0, 0.0, TOLERANCES["transformers"].logits
    for ours, theirs in cases:
        total += 1
        if ours.shape != theirs.shape:
            detail = f"lexmill gives the shape {ours.shape}, this {theirs.shape}"
            return Check(runtime, check, False, float("inf"), tolerance, detail)
        greatest = float(np.maximum(greatest, np.abs(log_softmax(ours) - log_softmax(theirs)).max()))
    if not total:
        return Check(runtime, check, None, detail=f"the model takes none of the {unit}")
    detail = f"{total} {unit}: greatest difference of a log-probability {greatest:.2g}"
    return Check(runtime, check, bool(greatest <= tolerance), greatest, tolerance, detail)  # NaN is no pass


def mean_divergence(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence of rows of log-probabilities, in nats."""
    # a runtime's float32 softmax does not quite sum to one, which would hide divergences below 1e-6
    theirs = theirs - np.log(np.exp(theirs).sum(-1, keepdims=True))
    return max(0.0, float((np.exp(ours) * (ours - theirs)).sum(-1).mean()))


_NO_TOLERANCE = "no tolerance is stated for this type of file"
