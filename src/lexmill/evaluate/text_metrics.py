"""How near a text comes to its references: ROUGE by Google's package, BLEU and chrF by sacrebleu; and lengths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from lexmill.errors import MissingPackageError

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# Letters that are words, or nearly so: Chinese, kana.
_CHARACTER = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_PIECES = re.compile(f"{_CHARACTER}|[^\\W_]+?(?={_CHARACTER})|[^\\W_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")


class CharacterTokenizer:
    """Each Chinese or Japanese character by itself, other words whole and in lower case; for `rouge_score`.

    Its own tokenizer keeps a-z and 0-9 only: nothing would be left of a Chinese text.
    """

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text."""
        return _PIECES.findall(text.lower())


def in_characters(texts: Sequence[str]) -> bool:
    """Whether a language that puts no spaces between words prevails: half of the texts hold such letters."""
    return 2 * sum(bool(re.search(_CHARACTER, text)) for text in texts) > len(texts)


def rouge(
    given: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, str]]:
    """Mean F-measures in [0, 1] (Lin 2004), of several references the best; and how words were told apart.

    Without stemming. For ROUGE-Lsum a text is cut into sentences at line ends and behind full stops.

    Raises:
        MissingPackageError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingPackageError("rouge-score", "to score summaries", "metrics") from error
    characters = in_characters([text for right in references for text in right])
    scorer = RougeScorer(list(ROUGE), tokenizer=CharacterTokenizer() if characters else None)
    found = []
    for said, right in zip(given, references, strict=True):
        scores = scorer.score_multi([_sentences(text) for text in right], _sentences(said))
        found.append([scores[name].fmeasure for name in ROUGE])
    means = np.mean(found, 0) if found else np.zeros(len(ROUGE))
    how = {"rouge_tokenizer": "characters and words" if characters else "rouge-score's own, no stemming"}
    return {name: round(float(mean), 5) for name, mean in zip(ROUGE, means)}, how


def _sentences(text: str) -> str:
    return "\n".join(part.strip() for part in _SENTENCE_END.split(text) if part.strip())


def bleu(
    given: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, str]]:
    """BLEU (Papineni et al. 2002) and chrF (Popović 2015) of the corpus in percent, and sacrebleu's signatures.

    Raises:
        MissingPackageError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise MissingPackageError("sacrebleu", "to score translations", "metrics") from error
    most = max(map(len, references))
    columns = [
        [right[place] if place < len(right) else None for right in references] for place in range(most)
    ]
    chinese = in_characters([text for right in references for text in right])
    found, signatures = {}, {}
    for name, metric in (("bleu", BLEU(tokenize="zh" if chinese else "13a")), ("chrf", CHRF())):
        found[name] = round(float(metric.corpus_score(list(given), cast(Any, columns)).score), 4)
        signatures[f"{name}_signature"] = str(metric.get_signature())
    return found, signatures


def length_statistics(given: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Characters of what was written beside those of the (first) references, and how many wrote nothing."""
    mine = np.array([len(text) for text in given] or [0])
    theirs = np.array([len(right[0]) for right in references] or [0])
    return {
        "given_characters": round(float(mine.mean()), 1),
        "expected_characters": round(float(theirs.mean()), 1),
        "ratio": round(float(mine.sum() / max(theirs.sum(), 1)), 4),
        "empty": sum(not text for text in given),
    }


def first_sentence(text: str) -> str:
    """Up to the first full stop: the simplest summary, and hard to beat."""
    return next((part.strip() for part in _SENTENCE_END.split(text) if part.strip()), "")
