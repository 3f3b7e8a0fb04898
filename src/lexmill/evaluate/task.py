"""Scores of a task on held-out rows: the model answers each, and the task's own metrics compare."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from lexmill.config import suggest
from lexmill.data.forms import read_rows
from lexmill.data.labelled import Conversation, LabelledText, Match, Preference, Question, Row
from lexmill.errors import ConfigError
from lexmill.evaluate.chat import chat_scores
from lexmill.evaluate.classify import classify_scores
from lexmill.evaluate.embed import embed_scores
from lexmill.evaluate.prefer import prefer_scores
from lexmill.evaluate.qa import extractive_scores
from lexmill.evaluate.scores import ScoreConfig, Scoring, TaskScores
from lexmill.inference.language_model import LanguageModel
from lexmill.progress import SILENT, Progress

# A new task: a file with a function that scores it; its name here, with the kind of row that it takes.
SCORERS: dict[str, tuple[type[Row], Callable[[LanguageModel, Scoring], TaskScores]]] = {
    "chat": (Conversation, chat_scores),
    "classify": (LabelledText, classify_scores),
    "qa": (Question, extractive_scores),
    "embed": (Match, embed_scores),
    "prefer": (Preference, prefer_scores),
}


def score_task(
    task: str,
    model: LanguageModel,
    data: Path,
    config: ScoreConfig | None = None,
    progress: Progress = SILENT,
) -> TaskScores:
    """Score `model` on the rows of a file.

    Raises:
        ConfigError: there is no such task.
        DataError: no rows, or rows that the task does not take.
        ModelError: a model that cannot do the task.
    """
    if task not in SCORERS:
        raise ConfigError(f"There is no task '{task}'.", suggest(task, SCORERS))
    kind, scorer = SCORERS[task]
    config = config or ScoreConfig()
    rows = list(itertools.islice(read_rows(data, config, kind), config.limit))
    return scorer(model, Scoring(rows, config, progress))
