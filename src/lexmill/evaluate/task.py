"""Scores of a task on held-out rows: the model answers each, and the task's own metrics compare."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from lexmill.config import suggest
from lexmill.data.forms import read_rows
from lexmill.data.labelled import KINDS_OF_TASKS, Row
from lexmill.errors import ConfigError
from lexmill.evaluate.chat import chat_scores
from lexmill.evaluate.classify import classify_scores
from lexmill.evaluate.embed import embed_scores
from lexmill.evaluate.prefer import prefer_scores
from lexmill.evaluate.qa import extractive_scores
from lexmill.evaluate.scores import ScoreConfig, Scoring, TaskScores, Writer
from lexmill.evaluate.writing import summary_scores, translation_scores, written_answer_scores
from lexmill.inference.language_model import LanguageModel
from lexmill.progress import SILENT, Progress

TaskScorer = Callable[[LanguageModel, Scoring], TaskScores]


def qa_scores(model: LanguageModel, scoring: Scoring) -> TaskScores:
    """Of an encoder, which finds answers; or of a model that writes them."""
    scorer = extractive_scores if model.config.shape == "encoder" else written_answer_scores
    return scorer(model, scoring)


# A new task: a file with a function that scores it, and its name here.
SCORERS: dict[str, TaskScorer] = {
    "chat": chat_scores,
    "classify": classify_scores,
    "embed": embed_scores,
    "prefer": prefer_scores,
    "qa": qa_scores,
    "summarise": summary_scores,
    "translate": translation_scores,
}


def score_task(
    task: str,
    model: LanguageModel,
    data: Path,
    config: ScoreConfig | None = None,
    progress: Progress = SILENT,
    write: Writer | None = None,
) -> TaskScores:
    """Score `model` on the rows of a file.

    Args:
        write: who writes, if not the model itself; for tasks that write.

    Raises:
        ConfigError: there is no such task.
        DataError: no rows, or rows that the task does not take.
        ModelError: a model that cannot do the task.
    """
    kind, scorer = find_scorer(task)
    config = config or ScoreConfig()
    rows = list(itertools.islice(read_rows(data, config, kind), config.limit))
    return scorer(model, Scoring(rows, config, progress, write))


def find_scorer(task: str) -> tuple[type[Row], TaskScorer]:
    """The kind of row that a task takes, and what scores it.

    Raises:
        ConfigError: there is no such task.
    """
    if task not in SCORERS:
        raise ConfigError(f"There is no task '{task}'.", suggest(task, SCORERS))
    return KINDS_OF_TASKS[task], SCORERS[task]
