"""Question answering in the model's own words: a decoder or an encoder–decoder writes the answer."""

from __future__ import annotations

from lexmill.data.labelled import Question
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.lesson import Lesson
from lexmill.finetune.rows import TaskData
from lexmill.finetune.writing import writing_lesson
from lexmill.model.directory import ModelDirectory


def answer_lesson(config: FinetuneConfig, model: ModelDirectory, data: TaskData) -> Lesson:
    """Rows of a question, its context and the answers; see `writing_lesson`.

    To a question that its context does not answer the answer is `config.no_answer`.
    """
    return writing_lesson(config, model, data, Question)
