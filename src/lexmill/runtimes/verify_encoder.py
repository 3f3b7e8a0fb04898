"""What `verify` asks of an encoder: ids of texts and pairs, its heads, its embeddings, and what it fills in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lexmill.inference.language_model import LanguageModel
from lexmill.inference.sampling import log_softmax
from lexmill.inference.torch_backend import head_logits, hidden_rows, pair_logits
from lexmill.runtimes.verify_cases import PAIRS, TEXTS, id_rows, reads_back, usable_texts, with_gap
from lexmill.runtimes.verify_checks import same_ids, same_logprobs
from lexmill.runtimes.verify_report import Check, counted, short
from lexmill.runtimes.verify_stress import Stress
from lexmill.runtimes.verify_tolerances import TOLERANCES
from lexmill.tokenizer.pairs import read_pair

if TYPE_CHECKING:
    from lexmill.runtimes.verify_transformers import TransformersEncoder

_BEST = 5  # tokens that are compared for a gap
# Measured: 3e-6 on random models with twice the usual weights, hidden states of deviation 1.
_EMBEDDING_TOLERANCE = 1e-4


class EncoderComparison:
    """A runtime's answers against lexmill's, in float32; each method is one check.

    Args:
        name: of the runtime.
        model: lexmill's own, the reference.
        read: whether the model has a tokenizer; without one only ids are compared.
    """

    def __init__(self, name: str, runtime: TransformersEncoder, model: LanguageModel, read: bool) -> None:
        self.name, self.runtime, self.model, self.read = name, runtime, model, read
        self.config = model.config
        context = self.config.context
        self.texts = usable_texts(model.tokenizer, context) if self.read else {}
        self.gaps = dict(self._gaps())
        self.rows = [*self.texts.values(), *self.gaps.values()] or id_rows(self.config.vocab_size, context)

    def _gaps(self) -> Iterator[tuple[str, list[int]]]:
        """Texts with exactly one mask, and their ids."""
        if not self.read or self.model.tokenizer.ids.mask is None:
            return
        mask = self.model.tokenizer.ids.mask
        written = self.model.tokenizer.token_text(mask)
        for text in self.texts:
            ids = self.model.tokenizer.encode(with_gap(text, written))
            if ids.count(mask) == 1 and len(ids) <= self.config.context:
                yield with_gap(text, written), ids

    def all(self) -> Iterator[Check]:
        """Every check that the model's tokenizer and heads allow, cheap ones first."""
        if self.read:
            yield self.tokens()
            if reads_back(self.model.tokenizer):
                yield self.round_trip()
        yield from self.answers()

    def answers(self) -> Iterator[Check]:
        """Of these, those of what the model computes."""
        if self.config.mlm:
            yield self.logits()
        if self.config.nsp:
            yield self.pairs()
        if self.config.labels or self.config.span:
            yield self.head()
        yield self.embeddings()
        if self.config.mlm and self.gaps:
            yield self.fill()

    def tokens(self) -> Check:
        """The ids of texts, with [CLS] and [SEP], and those of pairs with their segments."""
        tokenizer = self.model.tokenizer
        texts = same_ids(self.name, {text: tokenizer.encode(text) for text in TEXTS}, self.runtime.tokenize)
        texts = Stress(tokenizer).added_to(texts, self.runtime.tokenize)
        pairs = counted(
            self.name,
            "tokens",
            ((pair, *self._pair(pair)) for pair in PAIRS) if tokenizer.ids.sep is not None else (),
            "pairs of texts",
        )
        figure = (texts.figure or 0) + (pairs.figure or 0)
        return Check(self.name, "tokens", figure == 0, figure, 0, f"{texts.detail}; {pairs.detail}")

    def _pair(self, pair: tuple[str, str]) -> tuple[Any, Any]:
        ids, segments = self.model.tokenizer.encode_pair(*pair)
        their_ids, their_segments = self.runtime.pair(*pair)
        if not self.config.segments:  # then nothing reads them
            return ids, their_ids
        return (ids, segments), (their_ids, their_segments)

    def round_trip(self) -> Check:
        """The text of the ids of a text."""
        tokenizer = self.model.tokenizer
        cases = (
            (text, tokenizer.decode(ids), self.runtime.detokenize(ids)) for text, ids in self.texts.items()
        )
        return counted(self.name, "round trip", cases, "texts")

    def logits(self) -> Check:
        """The masked-language-modelling head at every place of texts with and without a mask."""
        if self.runtime.masked_logits(self.rows[0]) is None:
            return self._no_head("logits", "masked-language-modelling")
        cases = ((self.model.logits(ids), self._masked(ids)) for ids in self.rows)
        return same_logprobs(self.name, "logits", cases, f"texts ({len(self.gaps)} with a mask)")

    def _masked(self, ids: Sequence[int]) -> np.ndarray:
        found = self.runtime.masked_logits(ids)
        assert found is not None  # it was asked for above
        return found

    def pairs(self) -> Check:
        """The next-sentence head on pairs of texts, each with its own segments."""
        cases = []
        for ids, segments in self._pair_rows():
            theirs = self.runtime.pair_logits(ids, segments)
            if theirs is None:
                return self._no_head("pairs", "next-sentence")
            cases.append((pair_logits(self.model.network, ids, segments), theirs))
        return same_logprobs(self.name, "pairs", cases, "pairs")

    def head(self) -> Check:
        """The head that tells labels apart, or that finds answers, on pairs of texts."""
        name = "labels" if self.config.labels else "answers"
        cases = []
        for ids, segments in self._pair_rows():
            theirs = self.runtime.task_logits(ids, segments if self.config.segments else None)
            if theirs is None:
                return self._no_head(name, "task's")
            (ours,) = head_logits(self.model.network, [read_pair(ids, segments)])
            cases.append((ours if self.config.labels else ours.T, theirs))
        return same_logprobs(self.name, name, cases, "pairs")

    def _pair_rows(self) -> list[tuple[list[int], list[int]]]:
        second = max(self.config.segments - 1, 0)
        if not self.read or self.model.tokenizer.ids.sep is None:
            return [(ids, [0] * (len(ids) // 2) + [second] * (-(-len(ids) // 2))) for ids in self.rows]
        found = [self.model.tokenizer.encode_pair(*pair) for pair in PAIRS]
        return [(ids, kinds) for ids, kinds in found if len(ids) <= self.config.context]

    def _no_head(self, check: str, head: str) -> Check:
        named = self.runtime.architecture or "no class"
        detail = f"config.json names {named}, with which transformers leaves out the {head} head"
        return Check(self.name, check, None, detail=detail)

    def embeddings(self) -> Check:
        """Means of the last hidden states: texts padded to one length, or rows of ids."""
        if self.read and self.model.tokenizer.ids.pad is not None:
            texts = [text for text in self.texts if text.strip()]
            ours, theirs = self.model.embed(texts, pooling="mean"), self.runtime.mean_hidden_of_texts(texts)
        else:
            ours = np.stack([hidden_rows(self.model.network, [ids])[0].mean(0) for ids in self.rows])
            theirs = np.stack([self.runtime.mean_hidden(ids) for ids in self.rows])
        greatest = float(np.abs(ours - theirs).max())
        detail = f"{len(ours)} texts: greatest difference of a coordinate {greatest:.2g}, deviation {ours.std():.2g}"
        passed = bool(greatest <= _EMBEDDING_TOLERANCE)
        return Check(self.name, "embeddings", passed, greatest, _EMBEDDING_TOLERANCE, detail)

    def fill(self) -> Check:
        """The best tokens for a gap, in their order; two that lexmill can hardly tell apart may change places."""
        mask = self.model.tokenizer.require_mask()
        same, tied, wrong, first, tie = 0, 0, 0, "", TOLERANCES["transformers"].tie
        if self.runtime.masked_logits(self.rows[0]) is None:
            return self._no_head("fill", "masked-language-modelling")
        for text, ids in self.gaps.items():
            place = ids.index(mask)
            row = log_softmax(self.model.logits(ids)[place])
            expected = [filling.token for filling in self.model.fill_mask(text, _BEST)]
            read = self.runtime.tokenize(text)
            if read != ids:  # said by `tokens` already
                wrong += 1
                first = first or f"; {short(text)} has other ids here"
                continue
            answer = np.argsort(-self._masked(read)[place], kind="stable")[:_BEST]
            gaps = np.abs(row[expected] - row[answer])
            if expected == answer.tolist():
                same += 1
            elif (gaps <= tie).all():
                tied += 1
            else:
                wrong += 1
                first = first or f"; {short(text)}: lexmill {expected}, here {answer.tolist()}"
        detail = f"{same} of {len(self.gaps)} gaps have the same {_BEST} best tokens in the same order"
        if tied:
            detail += f", {tied} but for ties (allowed {tie:g})"
        return Check(self.name, "fill", wrong == 0, wrong, 0, detail + first, ties=tied)
