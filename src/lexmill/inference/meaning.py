"""One word in several texts: how alike its vectors are, layer by layer. NumPy only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lexmill.errors import ConfigError, DataError
from lexmill.inference.pieces import find_word, grouped, pieces, word_missing
from lexmill.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class WordInTexts:
    """The vectors of one word in several texts.

    Attributes:
        word: as asked for.
        texts: the texts, in the order given.
        vectors: (texts, layers + 1, width) float32; layer 0 is the embedding.
        similarity: (layers + 1, texts, texts): the cosines of the word's vectors.
        baseline: (layers + 1,): the mean cosine of two different words in two of the texts, without
            which the figures above say little: in many models all vectors point the same way.
    """

    word: str
    texts: tuple[str, ...]
    vectors: np.ndarray
    similarity: np.ndarray
    baseline: np.ndarray

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Every two texts, by index."""
        return list(itertools.combinations(range(len(self.texts)), 2))

    def to_json(self) -> dict[str, Any]:
        """The cosines as JSON values, rounded to 6 decimals; not the vectors."""
        return {
            "word": self.word,
            "texts": list(self.texts),
            "layers": [
                {
                    "layer": layer,
                    "similarity": np.round(matrix.astype(np.float64), 6).tolist(),
                    "other_words": None if np.isnan(other) else round(float(other), 6),
                }
                for layer, (matrix, other) in enumerate(zip(self.similarity, self.baseline))
            ],
        }


def word_in_texts(
    tokenizer: Tokenizer, word: str, texts: Sequence[str], hidden: Sequence[Any]
) -> WordInTexts:
    """Compare a word's vectors across texts.

    A word's vector in a layer is the mean of its tokens' hidden states. Where a text has the word
    more than once, its first occurrence counts.

    Args:
        tokenizer: the model's.
        word: a word that each text has; case does not matter.
        texts: two or more.
        hidden: for each text (layers + 1, tokens, width), layer 0 being the embedding.

    Raises:
        ConfigError: fewer than two texts.
        DataError: a text without the word; says which.
        ValueError: hidden states of another shape than the text has tokens.
    """
    check_word(tokenizer, word, texts)
    chosen, others = [], []
    for text, states in zip(texts, hidden):
        states = np.asarray(states, np.float32)
        parts = pieces(tokenizer, text)
        if states.ndim != 3 or states.shape[1] != len(parts):
            raise ValueError(
                f"hidden states have shape {states.shape}, not (layers + 1, {len(parts)}, width)"
            )
        places = find_word(parts, word)
        chosen.append(states[:, places[0]].mean(1))
        others.append(_other_words(parts, text, states, {index for place in places for index in place}))
    vectors = np.stack(chosen)
    unit = _unit(vectors)
    return WordInTexts(
        word=word,
        texts=tuple(texts),
        vectors=vectors,
        similarity=np.einsum("alw,blw->lab", unit, unit),
        baseline=_baseline(others, vectors.shape[1]),
    )


def check_word(tokenizer: Tokenizer, word: str, texts: Sequence[str]) -> None:
    """Refuse what `word_in_texts` cannot compare, before any model has run.

    Raises:
        ConfigError: fewer than two texts.
        DataError: no word, or a text without it.
    """
    if len(texts) < 2:
        raise ConfigError("A word is compared between two texts or more.", "Give another text with the word.")
    if not word.strip():
        raise DataError("The word is empty.")
    for number, text in enumerate(texts, 1):
        parts = pieces(tokenizer, text)
        if not find_word(parts, word):
            raise word_missing(word, text, grouped(parts, text)[0], f"text {number}")


def _other_words(parts: Any, text: str, states: np.ndarray, left_out: set[int]) -> dict[str, np.ndarray]:
    """The unit vectors (layers + 1, width) of a text's other words, by the word."""
    words, members = grouped(parts, text)
    return {
        word.text.casefold(): _unit(states[:, member].mean(1))
        for word, member in zip(words, members)
        if not word.special and not left_out & set(member)
    }


def _baseline(others: Sequence[dict[str, np.ndarray]], layers: int) -> np.ndarray:
    cosines = [
        (one * two).sum(-1)
        for first, second in itertools.combinations(others, 2)
        for name, one in first.items()
        for other_name, two in second.items()
        if name != other_name
    ]
    return np.mean(cosines, 0) if cosines else np.full(layers, np.nan)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
