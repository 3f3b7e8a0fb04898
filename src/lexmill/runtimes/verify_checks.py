"""The questions that `verify` asks a runtime, and how far its answers may be from lexmill's."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lexmill.inference.sampling import log_softmax
from lexmill.runtimes.verify_cases import id_rows
from lexmill.runtimes.verify_report import Check, counted, short
from lexmill.runtimes.verify_tolerances import TOLERANCES, Tolerance, mean_divergence

if TYPE_CHECKING:
    from lexmill.inference.language_model import LanguageModel
    from lexmill.runtimes.verify_reference import Reference

_RARE = 1e-4  # a token less probable than this everywhere is never written in practice
_PROBABLE = 20  # tokens at a position that are looked at one by one


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
        asked = sorted({*special, *ends, *ordinary, *self.runtime.declared_ids()})
        answers = {token: self.runtime.ends_at(token, before) for token in asked}
        limits = dict(self._fixed_ends(token for token in asked if answers[token] and token not in ends))
        check = counted(
            self.name,
            "stop tokens",
            ((token, token in ends, answers[token]) for token in asked if token not in limits),
            "ids",
            len(limits),
        )
        return replace(check, limits=tuple(limits.values()))

    def _fixed_ends(self, tokens: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Of tokens that end a text here and not for lexmill those that no file can stop from it, and are never likely."""
        fixed = getattr(self.runtime, "fixed_ends", lambda texts: ())(self.reference.tokenizer.vocabulary)
        for token in tokens:
            text = self.reference.tokenizer.token_text(token)
            likeliest = float(np.exp(self.reference.logprobs[:, token].max()))
            if text in fixed and likeliest <= _RARE:
                yield (
                    token,
                    f"the runtime ends a text at {short(text)} because of what the token is called; "
                    f"lexmill gives it a probability of {likeliest:.1g} at most",
                )

    def logits(self) -> Check:
        """The log-probabilities of all next tokens at several positions."""
        divergence, greatest, detail = self._apart_from(self.reference.logprobs)
        if self.tolerance is None:
            return Check(self.name, "logits", None, detail=f"{detail}; {_NO_TOLERANCE}")
        figure = divergence if self.tolerance.kind == "KL" else greatest
        passed = bool(figure <= self.tolerance.logits)  # not so for NaN
        if noise := self.reference.noise:
            detail += (
                f"; within lexmill, rounding activations to {self.reference.rounding} costs {noise.cost:.2g}, "
                "and twice that is allowed"
            )
        elif self.tolerance.kind == "max":
            detail += f"; within lexmill, the last bit of inputs changes {self.reference.spread:.2g}"
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
        if noise := self.reference.noise:
            detail += f"; the last bit of a float32 spreads to {noise.spread:.2g} by such rounding"
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
                f"is at most {largest:.2g} (allowed {self.tolerance.tie:.2g})"
            )
        return Check(self.name, "greedy", wrong == 0, wrong, 0, detail + first, ties=tied)

    def _ties(
        self, ids: list[int], answer: list[int], limit: int, tolerance: Tolerance
    ) -> tuple[np.ndarray, np.ndarray]:
        """Follow the runtime's own continuation: lexmill's gap at each token, and whether it may be there.

        A token that is not lexmill's first choice may stand where the gap is within `tie`, within twice
        the runtime's error at that position (and `again`), and, where the runtime rounds activations, within
        `rounded_tie` for lexmill that rounds them too.
        """
        reference = self.reference
        gaps = reference.choice_gaps(ids, answer, limit)
        fine = gaps <= tolerance.tie
        if reference.rounding and tolerance.rounded_tie < math.inf:
            fine &= reference.choice_gaps(ids, answer, limit, rounded=True) <= tolerance.rounded_tie
        for at in np.flatnonzero((gaps > 0) & fine):
            before = ids + answer[:at]
            ours, theirs = reference.row(before), self.runtime.logprobs([before], reference.vocabulary)[0]
            chosen = [answer[at]] if at < len(answer) else list(reference.tokenizer.ids.stop)
            looked_at = [*np.argsort(-ours)[:_PROBABLE], *chosen]
            fine[at] = gaps[at] <= 2 * np.abs(ours - theirs)[looked_at].max() + tolerance.again
        return gaps, fine


def compare_ids(runtime: str, other: Runtime, model: LanguageModel) -> Iterator[Check]:
    """The one check of a decoder without a tokenizer: what follows rows of ids."""
    size = model.config.vocab_size
    rows = id_rows(size, model.config.context)
    cases = ((model.logits(ids)[-1:], other.logprobs([ids], size)) for ids in rows)
    yield same_logprobs(runtime, "logits", cases, "rows of ids (the model has no tokenizer)")


class Limit(Protocol):
    """What a runtime is known to do otherwise with texts, whatever a file says."""

    def encode(self, text: str) -> list[int]: ...
    def reasons(self, texts: Iterable[str], among: str) -> tuple[str, ...]: ...


def same_ids(
    runtime: str,
    expected: Mapping[str, list[int]],
    tokenize: Callable[[str], list[int]],
    limit: Limit | None = None,
) -> Check:
    """The ids of texts on which tokenizers differ; ids that `limit` foretells are no difference, but are told."""
    answers = {text: tokenize(text) for text in expected}
    wrong = [text for text, ids in expected.items() if answers[text] != ids]
    limited = [text for text in wrong if limit is not None and answers[text] == limit.encode(text)]
    check = counted(
        runtime,
        "tokens",
        ((text, ids, answers[text]) for text, ids in expected.items() if text not in limited),
        "texts",
        len(limited),
    )
    if limit is not None and limited:
        check = replace(check, limits=limit.reasons(limited, f"{len(expected)} texts"))
    elif wrong and not any(unicodedata.is_normalized("NFC", text) for text in wrong):
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


_NO_TOLERANCE = "no tolerance is stated for this type of file"
