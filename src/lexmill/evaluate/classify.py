"""Scores of a classifier: accuracy, F1 of the labels, who is taken for whom, and how far its probabilities are true."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from lexmill.data.labelled import LabelledText
from lexmill.errors import ConfigError, DataError
from lexmill.evaluate.scores import Scoring, TaskScores
from lexmill.finetune.calibration import calibration_error, softmax
from lexmill.finetune.classify import check_labels
from lexmill.inference.judging import require_labels, temperature_of
from lexmill.inference.language_model import LanguageModel

_ROWS = 32  # computed at once


def classify_scores(model: LanguageModel, scoring: Scoring) -> TaskScores:
    """Accuracy, macro and weighted F1 over the labels, and the confusion matrix, by scikit-learn.

    The calibration error is that of the probabilities as the model gives them; "calibration_error_before" is
    without its temperature.

    Raises:
        ModelError: the model tells no labels apart.
        DataError: no rows, or a label that the model does not know.
        ConfigError: scikit-learn is not installed.
    """
    measures = _scikit()
    require_labels(model.config.labels)
    labels = model.config.labels
    rows = [cast(LabelledText, row) for row in scoring.rows]
    if not rows:
        raise DataError("There are no rows to score.")
    check_labels(rows, labels, "this model's training")
    parts = []
    with scoring.progress.task("classifying", len(rows), "texts") as task:
        for start in range(0, len(rows), 8 * _ROWS):
            some = rows[start : start + 8 * _ROWS]
            parts.append(model.label_logits([(row.text, row.second) for row in some], rows=_ROWS))
            task.advance(len(some))
    logits = np.concatenate(parts)
    right = np.array([labels.index(row.label) for row in rows])
    given = logits.argmax(-1)
    calibrated = softmax(logits, temperature_of(model.lineage))
    present = sorted({*right.tolist(), *given.tolist()})

    def f1(average: str | None) -> Any:
        return measures.f1_score(right, given, labels=present, average=average, zero_division=0)

    return TaskScores(
        task="classify",
        metrics={
            "accuracy": round(float((given == right).mean()), 5),
            "macro_f1": round(float(f1("macro")), 5),
            "weighted_f1": round(float(f1("weighted")), 5),
            "calibration_error": round(calibration_error(calibrated, right), 5),
            "calibration_error_before": round(calibration_error(softmax(logits), right), 5),
        },
        rows=len(rows),
        details={
            "labels": [labels[index] for index in present],
            "f1": {labels[index]: round(float(value), 5) for index, value in zip(present, f1(None))},
            # a row of the matrix is what is right, a column what was given
            "confusion": measures.confusion_matrix(right, given, labels=present).tolist(),
        },
        examples=[
            {
                "question": row.text if row.second is None else f"{row.text} | {row.second}",
                "expected": row.label,
                "given": labels[index],
            }
            for row, index in list(zip(rows, given.tolist()))[: scoring.config.examples]
        ],
        predictions=[
            {"label": labels[index], "probability": round(float(shares[index]), 6)}
            for index, shares in zip(given.tolist(), calibrated)
        ],
    )


def _scikit() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ConfigError(
            "Scores of a classifier need the package scikit-learn, which is not installed.",
            "pip install 'lexmill[metrics]'",
        ) from error
    return metrics
