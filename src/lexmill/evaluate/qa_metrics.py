"""Exact match and F1 of answers, as the official scripts of SQuAD and of CMRC 2018 compute them. In percent.

English: Rajpurkar et al. 2018, "Know What You Don't Know", and its script evaluate-v2.0. Chinese: Cui et al.
2019, "A Span-Extraction Dataset for Chinese Machine Reading Comprehension", and its script cmrc2018_evaluate.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from lexmill.errors import ConfigError

LANGUAGES = ("auto", "en", "zh")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE = re.compile("[\u4e00-\u9fa5]")
# What CMRC's script takes as punctuation. It lists the two dots of "……" as one entry, which no single
# character equals, so that they stay; and the same here, or scores would differ.
_CHINESE_MARKS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")


def answer_scores(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], language: str = "auto"
) -> dict[str, float]:
    """Exact match and F1 over all questions, in percent.

    Args:
        predictions: what the model answered; "" for "the text does not say".
        answers: of each question all that count as right; none where the text does not say.
        language: "en" scores as SQuAD, "zh" as CMRC 2018, "auto" as the answers look.

    Returns:
        "exact" and "f1"; where some questions have no answer also "answerable_exact", "answerable_f1" and
        "unanswerable_exact".

    Raises:
        ConfigError: another language; or Chinese without the package nltk, which CMRC's script uses.
    """
    exact, f1 = each_score(predictions, answers, language)
    has = np.array([bool(right) for right in answers], bool)
    found = {"exact": _percent(exact), "f1": _percent(f1)}
    if not has.all():
        if has.any():
            found["answerable_exact"] = _percent(exact[has])
            found["answerable_f1"] = _percent(f1[has])
        found["unanswerable_exact"] = _percent(exact[~has])
    return found


def each_score(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], language: str = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of each question, in [0, 1]: (questions,) each. See `answer_scores`."""
    if len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} questions")
    chinese = find_language(answers, language) == "zh"
    exact_of, f1_of = (_chinese_exact, _chinese_f1) if chinese else (_english_exact, _english_f1)
    pairs = list(zip(predictions, answers, strict=True))
    return (
        np.array([_best(exact_of, said, right, chinese) for said, right in pairs]),
        np.array([_best(f1_of, said, right, chinese) for said, right in pairs]),
    )


def find_language(answers: Sequence[Sequence[str]], language: str = "auto") -> str:
    """ "en" or "zh": as asked for, or Chinese where half of the answers hold a Chinese character.

    Raises:
        ConfigError: another language.
    """
    if language not in LANGUAGES:
        raise ConfigError(f"There is no language '{language}'.", f"Take one of {', '.join(LANGUAGES)}.")
    if language != "auto":
        return language
    texts = [text for right in answers for text in right]
    return "zh" if 2 * sum(bool(_CHINESE.search(text)) for text in texts) > len(texts) else "en"


def best_threshold(null_scores: np.ndarray, answered: np.ndarray, silent: np.ndarray) -> float:
    """Above which difference "no answer" should be said, so that the sum of scores is highest.

    Args:
        null_scores: (questions,): by how much "no answer" scores above the best answer.
        answered, silent: (questions,): the question's score if it is answered, and if "no answer" is said.

    Returns:
        The threshold, halfway between two questions; infinite where it is best to answer always.
    """
    order = np.argsort(null_scores, kind="stable")
    # the k questions of the lowest scores are answered, the others are not
    totals = np.append(0.0, np.cumsum(answered[order])) + np.append(np.cumsum(silent[order][::-1])[::-1], 0.0)
    # only between two different scores can a threshold lie
    ordered = null_scores[order]
    borders = np.append(np.append(True, ordered[1:] > ordered[:-1]), True)[: len(totals)]
    best = int(np.argmax(np.where(borders, totals, -np.inf)))
    if best == len(order):
        return float("inf")
    if best == 0:
        return float(ordered[0]) - 1.0
    return float((ordered[best - 1] + ordered[best]) / 2)


def normalise_english(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and spaces beyond one."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _best(score: Callable[[str, str], float], said: str, right: Sequence[str], chinese: bool) -> float:
    """The best over all right answers; with none, whether nothing was said."""
    if not chinese:  # an answer of nothing but articles and punctuation is none
        right = [text for text in right if normalise_english(text)]
    return max(score(said, text) for text in (right or [""]))


def _english_exact(said: str, right: str) -> float:
    return float(normalise_english(said) == normalise_english(right))


def _english_f1(said: str, right: str) -> float:
    mine, theirs = normalise_english(said).split(), normalise_english(right).split()
    if not mine or not theirs:
        return float(mine == theirs)
    return _f1(sum((Counter(mine) & Counter(theirs)).values()), len(mine), len(theirs))


def _chinese_exact(said: str, right: str) -> float:
    return float(_without_marks(said) == _without_marks(right))


def _chinese_f1(said: str, right: str) -> float:
    mine, theirs = chinese_pieces(said), chinese_pieces(right)
    if not mine and not theirs:  # CMRC has no question without an answer; this is as SQuAD says
        return 1.0
    return _f1(_common_run(mine, theirs), len(mine), len(theirs))


def _without_marks(text: str) -> str:
    return "".join(letter for letter in text.lower().strip() if letter not in _CHINESE_MARKS)


def chinese_pieces(text: str) -> list[str]:
    """Each Chinese character by itself, everything else as English words; marks are dropped.

    Raises:
        ConfigError: there are words, and the package nltk, which cuts them in CMRC's script, is missing.
    """
    pieces: list[str] = []
    other = ""
    for letter in _without_marks(text):
        if _CHINESE.match(letter):
            pieces += _words(other)
            pieces.append(letter)
            other = ""
        else:
            other += letter
    return pieces + _words(other)


def _words(text: str) -> list[str]:
    if text.isalnum() or not text.strip():  # as most runs are; no tokenizer cuts them
        return [text] if text.strip() else []
    try:
        from nltk.tokenize import word_tokenize
    except ImportError as error:
        raise ConfigError(
            "Scores of Chinese answers need the package nltk, which is not installed.",
            "pip install 'lexmill[metrics]'",
        ) from error
    # one line: sentences of such a run are not told apart, which would need a downloaded model
    return word_tokenize(text, preserve_line=True)


def _common_run(mine: Sequence[str], theirs: Sequence[str]) -> int:
    """The length of the longest run of pieces that both have."""
    longest, before = 0, [0] * (len(theirs) + 1)
    for piece in mine:
        here = [0]
        for index, other in enumerate(theirs):
            here.append(before[index] + 1 if piece == other else 0)
        longest, before = max(longest, *here), here
    return longest


def _f1(common: int, mine: int, theirs: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / mine, common / theirs
    return 2 * precision * recall / (precision + recall)


def _percent(scores: np.ndarray) -> float:
    return round(100 * float(scores.mean()), 4) if len(scores) else 0.0
