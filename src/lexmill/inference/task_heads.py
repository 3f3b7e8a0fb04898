"""What a model does with the head of its task: labels, and answers found in a text. A part of `LanguageModel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lexmill.errors import DataError, ModelError
from lexmill.inference.backend import Backend
from lexmill.model.config import ModelConfig
from lexmill.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:  # `generate` starts without these
    from lexmill.inference.judging import Answer


class TaskHeads:
    """Methods of models with a task's head."""

    config: ModelConfig
    lineage: Mapping[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError  # LanguageModel has these

    @property
    def backend(self) -> Backend:
        raise NotImplementedError

    def classify(
        self, texts: str | Sequence[str], second: str | Sequence[str] | None = None, *, rows: int = 16
    ) -> list[dict[str, float]]:
        """For each text, or pair of texts, the probability of every label, the likeliest first.

        Probabilities are calibrated if the model was when it was fine-tuned. A text that the context does not
        hold is cut.

        Args:
            second: of each pair the other text.
            rows: computed at once.

        Raises:
            ModelError: the model has no head that tells labels apart.
            DataError: an empty text, or not as many second texts.
        """
        from lexmill.inference.judging import label_probabilities, require_labels, temperature_of

        require_labels(self.config.labels)
        first = [texts] if isinstance(texts, str) else list(texts)
        others: list[str | None] = [None] * len(first)
        if second is not None:
            others = [second] if isinstance(second, str) else list(second)
        if len(others) != len(first):
            raise DataError(f"There are {len(first):,} texts, but {len(others):,} second ones.")
        for number, text in enumerate(first, 1):
            if not text.strip():
                raise DataError(f"Text {number} is empty.")
        asked = list(zip(first, others, strict=True))
        logits = self.label_logits(asked, rows=rows)
        return label_probabilities(logits, self.config.labels, temperature_of(self.lineage))

    def label_logits(self, pairs: Sequence[tuple[str, str | None]], *, rows: int = 16) -> np.ndarray:
        """The logits of every label, not calibrated, float32: (len(pairs), labels)."""
        from lexmill.inference.judging import by_length, require_labels
        from lexmill.tokenizer.pairs import cut, encode_pairs

        require_labels(self.config.labels)
        encoded = [cut(pair, self.config.context) for pair in encode_pairs(self.tokenizer, pairs)]
        found = by_length(encoded, self.backend.head_logits, rows)
        return np.stack(found) if found else np.zeros((0, len(self.config.labels)), np.float32)

    def answer(self, question: str, context: str) -> Answer:
        """What a text says to a question, in its own words (encoders with a head that finds answers)."""
        return self.answers([(question, context)])[0]

    def answers(self, questions: Sequence[tuple[str, str]], *, rows: int = 16) -> list[Answer]:
        """The same for many pairs of question and context.

        Raises:
            ModelError: the model has no head that finds answers.
            DataError: an empty question or context.
        """
        from lexmill.inference.judging import AnswerSettings, find_answers

        if not self.config.span:
            raise ModelError(
                "This model has no head that finds answers in a text.",
                "Give an encoder one: lexmill finetune MODEL --task qa --data FILE --out DIR",
            )
        settings = AnswerSettings.of(self.lineage, self.config.context)
        compute = self.backend.head_logits
        return find_answers(self.tokenizer, questions, settings, compute, rows)
