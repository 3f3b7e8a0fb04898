"""What may stand in the gaps of a text, and which sentence may follow another. A part of `LanguageModel`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lexmill.errors import DataError, ModelError
from lexmill.inference.backend import Backend
from lexmill.inference.beams import Hypothesis
from lexmill.inference.sampling import log_softmax
from lexmill.model.config import ModelConfig
from lexmill.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Filling:
    """What may stand in a gap: the token, its text, its probability, and the whole text with it."""

    token: int
    text: str
    probability: float
    sentence: str


class Filler:
    """Methods of models that were pretrained on texts with gaps."""

    config: ModelConfig

    @property
    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError  # LanguageModel has these

    @property
    def backend(self) -> Backend:
        raise NotImplementedError

    @property
    def kind(self) -> str:
        raise NotImplementedError

    def logits(self, ids: Sequence[int], decoder_ids: Sequence[int] | None = None) -> np.ndarray:
        raise NotImplementedError

    def beam_ids(
        self,
        ids: Sequence[int],
        *,
        beams: int = 4,
        max_tokens: int = 256,
        length_penalty: float = 1.0,
        stop: Sequence[int] = (),
    ) -> list[Hypothesis]:
        raise NotImplementedError

    def _require(self, shape: str, what: str) -> None:
        raise NotImplementedError

    def _checked(self, ids: Iterable[int], what: str = "The text") -> list[int]:
        raise NotImplementedError

    def fill_mask(self, text: str, top: int = 5) -> list[Filling]:
        """The likeliest tokens for the one mask in `text`, best first (encoders with the MLM head).

        Raises:
            ModelError: a model of another shape, or a tokenizer without a mask token.
            DataError: no mask in the text, or several.
        """
        self._require("encoder", "fill-mask")
        mask = self.tokenizer.require_mask()
        mask_text = self.tokenizer.token_text(mask)
        ids = self.tokenizer.encode(text)
        places = [place for place, token in enumerate(ids) if token == mask]
        if len(places) != 1:
            raise DataError(
                f"The text has {len(places)} masks, but exactly one is filled at a time.",
                f"Put {mask_text} where the word is missing, once.",
            )
        row = log_softmax(self.logits(ids)[places[0]])
        best = np.argsort(-row, kind="stable")[: max(top, 1)]
        found = []
        for token in (int(index) for index in best):
            known = token < self.tokenizer.vocab_size
            word = self.tokenizer.decode([token]).strip() if known else ""
            shown = word.removeprefix("##")
            found.append(Filling(token, word, float(np.exp(row[token])), text.replace(mask_text, shown, 1)))
        return found

    def fill_spans(self, text: str, beams: int = 8, top: int = 5, max_tokens: int = 48) -> list[Filling]:
        """The likeliest texts for the gaps in `text`, marked by sentinels, best first (encoder–decoders).

        Gaps are marked by the sentinels in order: `<extra_id_0>`, then `<extra_id_1>` and so on. An answer
        ends where the model ends it, or begins a gap that the text does not have. The probability is that
        of the answer, summed over all beams that say the same.

        Raises:
            ModelError: a model of another shape, or a tokenizer without sentinels.
            DataError: no gap in the text.
        """
        self._require("encoder_decoder", "filling gaps of several words")
        sentinels = self.tokenizer.require_sentinels()
        ids = self.tokenizer.encode(text)
        gaps = [token for token in ids if token in sentinels]
        if not gaps:
            raise DataError(
                "The text has no gap to fill.",
                f"Put {self.tokenizer.token_text(sentinels[0])} where the words are missing.",
            )
        beyond = [token for token in sentinels if token not in gaps]
        found: dict[str, Filling] = {}
        for one in self.beam_ids(ids, beams=max(beams, 2 * top), max_tokens=max_tokens, stop=beyond):
            pieces: dict[int, list[int]] = {}
            current: int | None = None
            for token in one.ids:
                if token in sentinels:
                    current = token
                elif current is not None:
                    pieces.setdefault(current, []).append(token)
            filled, shown = text, []
            for gap in gaps:
                words = self.tokenizer.decode(pieces.get(gap, []), skip_special=True).strip()
                filled = filled.replace(self.tokenizer.token_text(gap), words, 1)
                shown.append(words)
            said = " … ".join(shown)
            before = found[said].probability if said in found else 0.0
            found[said] = Filling(gaps[0], said, before + float(np.exp(one.logprob)), filled)
        return sorted(found.values(), key=lambda one: -one.probability)[:top]

    def next_sentence(self, first: str, second: str) -> float:
        """The probability that `second` follows `first` (encoders with a next-sentence head).

        Raises:
            ModelError: a model without such a head.
            DataError: one of the texts is empty.
        """
        if not self.config.nsp:
            raise ModelError(
                f"This model has no next-sentence head; it is {self.kind}.",
                "An encoder that was pretrained with next_sentence = true has one.",
            )
        for name, text in (("first", first), ("second", second)):
            if not text.strip():
                raise DataError(f"The {name} sentence is empty.")
        ids, segments = self.tokenizer.encode_pair(first, second)
        return float(np.exp(log_softmax(self.backend.pair_logits(self._checked(ids), segments)))[0])
