"""Summarisation as a fine-tuning task: a text to a shorter one."""

from __future__ import annotations

from lexmill.data.labelled import TextPair
from lexmill.finetune.config import FinetuneConfig
from lexmill.finetune.lesson import Lesson
from lexmill.finetune.rows import TaskData
from lexmill.finetune.writing import writing_lesson
from lexmill.model.directory import ModelDirectory


def summarise_lesson(config: FinetuneConfig, model: ModelDirectory, data: TaskData) -> Lesson:
    """Rows of a source and its summaries; see `writing_lesson`."""
    return writing_lesson(config, model, data, TextPair)
