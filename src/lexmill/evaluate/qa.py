"""Scores of an encoder that finds answers: exact match and F1 as the official scripts of SQuAD and CMRC have them."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from lexmill.data.labelled import Question
from lexmill.errors import DataError
from lexmill.evaluate.qa_metrics import answer_scores, best_threshold, each_score, find_language
from lexmill.evaluate.scores import Scoring, TaskScores
from lexmill.inference.judging import Answer
from lexmill.inference.language_model import LanguageModel

_ROWS = 16  # windows computed at once
_PART = 128  # questions between two movements of the progress bar


def extractive_scores(model: LanguageModel, scoring: Scoring) -> TaskScores:
    """Exact match and F1 in percent; where questions have no answer, also by the best threshold for these rows.

    Raises:
        ModelError: a model without a head that finds answers.
        DataError: no rows.
    """
    questions = [cast(Question, row) for row in scoring.rows]
    if not questions:
        raise DataError("There are no questions to score.")
    given: list[Answer] = []
    with scoring.progress.task("answering", len(questions), "questions") as task:
        for start in range(0, len(questions), _PART):
            some = questions[start : start + _PART]
            given += model.answers([(one.question, one.context) for one in some], rows=_ROWS)
            task.advance(len(some))
    right = [one.answers for one in questions]
    language = find_language(right, scoring.config.language)
    details: dict[str, Any] = {"scored as": {"en": "SQuAD", "zh": "CMRC 2018"}[language]}
    if not all(right):
        threshold = find_threshold(given, questions, language)
        best = answer_scores([_said(one, threshold) for one in given], right, language)
        details["best threshold here"] = None if np.isinf(threshold) else round(threshold, 4)
        details["F1 with it"] = best["f1"]
    said = [one.text for one in given]
    return TaskScores(
        task="qa",
        metrics=answer_scores(said, right, language),
        rows=len(questions),
        details=details,
        examples=[
            {
                "question": one.question,
                "expected": one.answers[0] if one.answers else "",
                "given": answer,
            }
            for one, answer in list(zip(questions, said))[: scoring.config.examples]
        ],
        predictions=[
            {"id": one.id, "answer": answer.text, "null_score": _finite(answer.null_score)}
            for one, answer in zip(questions, given)
        ],
    )


def find_threshold(given: list[Answer], questions: list[Question], language: str = "auto") -> float:
    """Above which "null score" it is best to say nothing, by the F1 of these questions."""
    right = [one.answers for one in questions]
    _, answered = each_score([one.candidate for one in given], right, language)
    _, silent = each_score([""] * len(given), right, language)
    return best_threshold(np.array([one.null_score for one in given]), answered, silent)


def _said(answer: Answer, threshold: float) -> str:
    return "" if answer.null_score > threshold else answer.candidate


def _finite(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None
